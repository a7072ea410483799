import math
MICA, STOCK = "MiCA, mica.fast", "MiCA, stock PEFT"
SAME_RANK, SAME_SIZE, FULL = "LoRA, same rank", "LoRA, same size", "full fine-tuning"
def validation_loss(run):
    found = run["evaluation"]
    if found is None:
        return math.inf
    return (found["facts, validation"] + found["prose, validation"]) / 2
def tried(result, method):
    return {r["rate"]: validation_loss(r) for r in result["runs"] if r["method"] == method and r["seed"] == 0}
def chosen_rate(result, method):
    from bench.quality_search import best
    return best(tried(result, method))
def write(path): return ""
