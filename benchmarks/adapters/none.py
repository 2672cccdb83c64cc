"No pruning: what the others are compared with"

def choose(model, context, criteria): raise NotImplementedError('it has no masks')

def hold(model, opt): return None

def callback(context): return None
