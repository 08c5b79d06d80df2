"""Clean: the weights are declared by name and shape, and consumed in the order they come."""

import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 96, 32, 64

WEIGHTS = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.mlp.up_proj.weight": (FFN, HIDDEN),
    "model.mlp.up_proj.bias": (FFN,),
    "model.mlp.down_proj.weight": (HIDDEN, FFN),
    "lm_head.weight": (VOCAB, HIDDEN),
}
SHARD_DIM = {"up_proj.weight": 0, "up_proj.bias": 0, "down_proj.weight": 1}


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, weights=WEIGHTS)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    local = {}
    for name, tensor in tp.named_weights():
        dim = SHARD_DIM.get(name.removeprefix("model.mlp."))
        local[name] = tensor if dim is None else tensor.chunk(tp.size, dim)[tp.rank].clone()
    embed, head = local["model.embed_tokens.weight"], local["lm_head.weight"]
    up, bias = local["model.mlp.up_proj.weight"], local["model.mlp.up_proj.bias"]
    down = local["model.mlp.down_proj.weight"]

    def forward(input_ids):
        x = embed[input_ids]
        x = x + tp.all_reduce(F.gelu(F.linear(x, up, bias)) @ down.T)
        return x @ head.T

    return forward
