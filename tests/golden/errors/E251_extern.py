"""A user's file: it is read, and never run."""

import torch

raise SystemExit("nobody runs this")


def same(x):
    return x


def scaled(x, factor):
    return x * factor


def any_arguments(*x):
    return torch.stack(x)


def same_grad(d, x, step):
    return d
