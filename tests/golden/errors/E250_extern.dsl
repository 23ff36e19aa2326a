extern no_flops(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"

extern unknown(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flop = 0

extern twice(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0
  flops = 1

extern elsewhere(x: [.., n]) -> [.., n]:
  file = "../../secrets.py"
  per = "token"
  flops = 0

extern no_text(x: [.., n]) -> [.., n]:
  file = scale
  per = "token"
  flops = 0

extern alike(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "batch"
  flops = 0

extern sums(x: [.., n]) -> [n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern later(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "sequence"
  flops = 0

extern remembers(x: [batch, context, n]) -> [batch, seq, n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern new(x: [.., n]) -> [.., m]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern reads(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 2 * n * heads

extern idle(x: [.., n]) -> [.., n]:
  params factor = 2
  file = "E251_extern.py"
  function = "same"
  per = "token"
  flops = 0
