"No pruning: what the others are compared with"

def hold(model, opt): return None

def callback(context): return None
