"""A server with a real engine under load: nothing is lost and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import httpx
import pytest
import torch

from runtime.serve.blocks import Blocks
from runtime.serve.engine import Engine
from runtime.serve.options import Options
from tests.support.served import all_idle, serving
from tests.support.tiny import Model

REQUESTS = int(os.environ.get("DSLC_TEST_REQUESTS", "200"))
"""1,000 take a minute of two processes."""


def real_engine() -> Engine:
    """Room for about eight answers at a time, so that some are preempted."""
    torch.set_num_threads(1)
    options = Options(page=4, max_requests=32, max_model_len=64, step_tokens=128)
    engine = Engine(Model(dtype=torch.float32, seed=3), options)
    engine.scheduler.blocks = Blocks(100)
    return engine


@pytest.mark.slow
def test_requests_leave_the_engine_as_it_was() -> None:
    """30 % cancelled at any time; all blocks are free then, and memory has not grown."""
    choose = random.Random(0)
    with serving(real_engine) as served:
        url = f"{served.url}/v1/completions"
        memory: list[int] = []

        def engine_bytes() -> int:
            pages = Path(f"/proc/{served.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")

        async def one(client: httpx.AsyncClient, gate: asyncio.Semaphore, i: int) -> int:
            prompt = [choose.randrange(96) for _ in range(choose.randrange(1, 20))]
            body = {"prompt": prompt, "max_tokens": choose.randrange(1, 24), "seed": i}
            body |= {"temperature": choose.choice([0, 1]), "ignore_eos": True}
            async with gate:
                if i == REQUESTS // 5:
                    memory.append(engine_bytes())
                if i % 10 >= 3:
                    response = await client.post(url, json=body)
                    usage = response.json()["usage"]
                    assert usage["completion_tokens"] == body["max_tokens"]
                    return 1
                task = asyncio.ensure_future(client.post(url, json={**body, "stream": True}))
                await asyncio.sleep(choose.uniform(0, 0.05))
                task.cancel()
                return 0

        async def run() -> int:
            gate = asyncio.Semaphore(40)
            async with httpx.AsyncClient(timeout=60) as client:
                return sum(await asyncio.gather(*(one(client, gate, i) for i in range(REQUESTS))))

        assert asyncio.run(run()) == REQUESTS * 7 // 10
        assert all_idle(served)
        stats = served.stats()
        assert stats["kv_cache_usage_perc"] == 0 and stats["num_preemptions_total"] > 0
        assert engine_bytes() < 1.05 * memory[0]
