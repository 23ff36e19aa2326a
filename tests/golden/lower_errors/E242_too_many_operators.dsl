block Example(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level1(x) + Level1(x)

block Level1(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level2(x) + Level2(x)

block Level2(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level3(x) + Level3(x)

block Level3(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level4(x) + Level4(x)

block Level4(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level5(x) + Level5(x)

block Level5(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level6(x) + Level6(x)

block Level6(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level7(x) + Level7(x)

block Level7(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level8(x) + Level8(x)

block Level8(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level9(x) + Level9(x)

block Level9(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level10(x) + Level10(x)

block Level10(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level11(x) + Level11(x)

block Level11(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level12(x) + Level12(x)

block Level12(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level13(x) + Level13(x)

block Level13(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level14(x) + Level14(x)

block Level14(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return Level15(x) + Level15(x)

block Level15(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return silu(x)
