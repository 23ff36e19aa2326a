extern sane(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern same(x: [.., n], y: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern scaled(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern any_arguments(x: [.., n]) -> [.., n]:
  file = "E251_extern.py"
  per = "token"
  flops = 0

extern other_numbers(x: [.., n]) -> [.., n]:
  params step = 1
  file = "E251_extern.py"
  function = "same"
  gradient = "same_grad"
  per = "token"
  flops = step

extern nowhere(x: [.., n]) -> [.., n]:
  file = "E251_nowhere.py"
  per = "token"
  flops = 0
