"""A row-parallel linear layer, and the same with the bias added once on every rank."""


class RowParallel:
    """y = x W^T + b; every rank holds some columns of W and gets the matching columns of x."""

    def __init__(self, tp, in_features, out_features):
        self.tp = tp
        self.weight = tp.weight("weight", out_features, in_features).chunk(tp.size, 1)[tp.rank]
        self.bias = tp.weight("bias", out_features)

    def __call__(self, x):
        partial = x.chunk(self.tp.size, -1)[self.tp.rank] @ self.weight.T
        return self.tp.all_reduce(partial) + self.bias


class WrongRowParallel(RowParallel):
    """At TP=N it adds the bias N times."""

    def __call__(self, x):
        partial = x.chunk(self.tp.size, -1)[self.tp.rank] @ self.weight.T
        return self.tp.all_reduce(partial + self.bias)
