block MLA(x: [batch]) -> [batch]:
  return x
