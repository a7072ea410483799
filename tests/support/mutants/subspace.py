"""Wrong edits of the solver for batches on an accelerator."""

SUBSPACE = {
    ("mica/subspace/batched.py", "tests/mica/subspace/test_batched.py"): {
        "BatchGram.read": [("raise DoubtfulError", "pass")],
        "BatchGram.holds": [("self._doubts.append((condition, tensors))", "pass")],
        "BatchGram.factor": [
            ("shifted = (shifted / self._scale).float()", "shifted = shifted.float()"),
            ("with full_fp32()", "if True"),
        ],
        "BatchGram.solve": [
            ("range(_CORRECTIONS)", "range(0)"),
            ("torch.addcmul(vectors, self._shift, solution)", "vectors"),
        ],
        "BatchGram._roughly_solved": [("with full_fp32()", "if True")],
        "BatchGram.svd": [
            ("unit, second, _ = self.orthonormal(unit)", "second = torch.eye(5).double().expand_as(first)"),
        ],
    },
    ("mica/subspace/batched.py", "tests/mica/subspace/test_waits.py"): {
        "sent": [(", non_blocking=True", "")],
        "BatchGram.smallest": [
            ("in self._gram.cpu().numpy()", "in [one.cpu().numpy() for one in self._gram]"),
        ],
    },
    ("mica/subspace/krylov.py", "tests/mica/subspace/test_waits.py"): {
        "_orthogonalised": [("gram.patience and triangle is None", "False")],
        "smallest_eigenvectors": [("FIRST_CHECK + gram.patience", "FIRST_CHECK")],
        "bounds": [("if gram.patience", "if False")],
        "random_block": [("start.to(gram.device, non_blocking=True)", "start")],
    },
    ("mica/subspace/distributed.py", "tests/mica/subspace/test_distributed.py", "-k", "wait_once"): {
        "Sharing.agreed": [("tasks and not self.is_over:", "tasks:")],
    },
    ("mica/subspace/solver.py", "tests/mica/subspace/test_solver.py", "-k", "rank or weights or lazily"): {
        "solve_each": [("in_memory(weight.detach())", "weight.detach()")],
        "_check_rank": [("isinstance(rank, bool) or", "")],
        "_check_weight": [("weight.layout is not torch.strided or weight.is_nested", "False")],
    },
    ("mica/subspace/fingerprint.py", "tests/mica/subspace/test_solver.py", "-k", "lazily"): {
        "fingerprint": [("in_memory(weight.detach())", "weight.detach()")],
    },
    ("mica/subspace/fingerprint.py", "tests/mica/subspace/test_waits.py"): {
        "fingerprint": [("rows.split(_COPIED_CHUNKS * step)", "rows.split(step)")],
    },
    ("mica/subspace/device.py", "tests/mica/subspace/test_device.py", "tests/mica/subspace/test_waits.py"): {
        "_solved": [("in (False, True)", "in (False,)")],
        "batch_size": [
            ("min(MOST_AT_ONCE, ", "max(1, "),
            ("SHARE_OF_FREE * free_memory(device)", "free_memory(device)"),
            ("weights + ", ""),
        ],
        "free_memory": [("[0] + held", "[0]")],
    },
}
