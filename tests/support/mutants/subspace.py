"""Wrong edits of the solver of minor subspaces, its cache, and what shares its work."""

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
    ("mica/subspace/krylov.py", "tests/mica/subspace/test_krylov.py", "-k", "norm"): {
        "NORM_STEPS": [("12", "6")],
    },
    ("mica/subspace/distributed.py", "tests/mica/subspace/test_distributed.py", "-k", "wait_once"): {
        "Sharing.agreed": [("tasks and not self.is_over:", "tasks:")],
    },
    ("mica/subspace/distributed.py", "tests/mica/subspace/test_distributed.py"): {
        "solve_shared": [("if index not in results:", "if False:"), ("failed is not None:", "False:")],
        "_divided": [
            ("all(other == first for other in others)", "True"),
            ("first is not None and", ""),
        ],
        "_content": [
            ("quick_fingerprint(task.weight)", "task.name"),
            ("quick_fingerprint(task.weight)", "task.key"),
            ("not is_weight(task.weight)", "False"),
        ],
        "_described": [("isinstance(failure, ValueError)", "False")],
        "_gathered": [("and torch.cuda.current_device() == 0", "")],
        "_all_agree": [
            ("_decided(store, meeting, _MISSED) == _TOGETHER", "False"),
            ("if decided != _MISSED:", "if True:"),
        ],
        "decline": [("!= _MISSED", "== _MISSED")],
        "shares": [("loads.index(min(loads))", "0")],
    },
    (
        "mica/subspace/cache.py",
        "tests/mica/subspace/test_cache.py",
        "tests/mica/subspace/test_cache_files.py",
    ): {
        "_bytes": [("1024 if binary else 1000", "1000")],
        "folder_named": [
            ("if word in _OFF", "if setting in _OFF"),
            ("if word in _ON", "if setting in _ON"),
            ("os.path.expanduser(setting)", "setting"),
        ],
        "_foreign": [("not in (0, os.geteuid())", "not in (os.geteuid(),)"), ("stat.S_IWGRP |", "")],
        "SubspaceCache.get": [("or not self._is_trusted()", "")],
        "SubspaceCache.put": [("<= self.size", "<= 2 * self.size + 10**6")],
        "SubspaceCache._read": [("os.utime(path)", "pass"), ("_verify(weight, subspace)", "pass")],
        "SubspaceCache._write": [("temporary.unlink()", "pass"), ("_warned.discard(path)", "pass")],
        "SubspaceCache._evict": [
            ("now - status.st_mtime > ABANDONED_AFTER", "True"),
            ("sorted(stored)", "sorted(stored)[::-1]"),
        ],
        "_STORED_NAME": [("[0-9a-f]{64}\\.\\d+\\.subspace", ".*")],
        "_is_worth_keeping": [
            ("subspace.certified\n        and", ""),
            ("and not subspace.null_count", ""),
        ],
        "_content": [
            ("flags | at_once", "flags"),
            ("if why:", "if False:"),
            ("file.read(most_bytes)", "file.read()"),
        ],
        "_decoded": [
            ('or metadata["key"] != key', ""),
            ('metadata["version"] != str(VERSION) or', ""),
            ("checksum != _checksum(content)", "False"),
        ],
        "_verify": [
            ("(basis.T @ basis - identity)", "(identity - identity)"),
            ("(squares.diff() <= 0).all().item()", "True"),
            ("<= 1.001 * resolution", "<= 1.1 * resolution"),
            ("<= 1.001 * resolution", "<= resolution"),
            ("rank * subspace.resolution", "subspace.resolution"),
            ("allowed = 2 *", "allowed = 3 *"),
        ],
    },
    ("mica/subspace/candidate.py", "tests/mica/subspace/test_candidate.py"): {
        "problem": [('method == "krylov"', "True")],
        "candidate": [
            ("NULL_RESOLUTIONS * floor + gram.error", "NULL_RESOLUTIONS * floor"),
            ("< floor + gram.error", "< floor"),
            ("resolved and not problem.basis_is_long", "resolved"),
        ],
        "judged": [("energy - least).clamp_min(0)", "energy * 0).clamp_min(0)")],
        "signs_of": [("basis.abs().argmax", "basis.argmax")],
        "energy_of": [
            ("+ problem.rank * unseen", ""),
            ("triplets.basis * signs", "triplets.basis"),
            ("(total * gram.apply(change))", "(change * gram.apply(change))"),
        ],
    },
    ("mica/subspace/certificate.py", "tests/mica/subspace/test_certificate.py"): {
        "certify": [
            ("- SLACK * floor", "- 9 * floor"),
            ("rank**0.5 * residual +", ""),
            ("+ gram.error)", ")"),
            ("passed | gram.exceeds(vectors, 2 * norm, bound)", "passed | True"),
            ("2 * norm, bound", "0 * norm, bound"),
            ("passed = norm == 0", "passed = norm < 0"),
        ],
    },
    ("mica/subspace/result.py", "tests/mica/subspace/test_certificate.py"): {
        "is_certified": [("+ rank * resolution", ""), ("rank * resolution", "resolution")],
        "narrowed": [
            ("[:, dropped:]", "[:, :rank]"),
            ("not stored.certified or", ""),
            ("or stored.null_count", ""),
        ],
    },
    ("mica/subspace/methods.py", "tests/mica/subspace/test_candidate.py"): {
        "route": [("4 * rank > 3 * size", "4 * rank >= 3 * size"), ("size > max(", "size >= max(")],
        "by_krylov": [("or not ritz.converged", ""), ("ritz is None or", "")],
        "by_svd": [("long_vectors[:, -rank:]", "long_vectors[:, :rank]"), ("<= noise", "< 0")],
        "chain": [('if method == "auto"', "if True")],
    },
    ("mica/subspace/gram.py", "tests/mica/subspace/test_gram.py"): {
        "row_blocks": [
            ("memory[..., : rows.stop - rows.start, :]", "memory"),
            ("tall.dtype == dtype", "True"),
            ("max(BLOCK_ROWS, BLOCK_ELEMENTS // short_features)", "long_features"),
        ],
        "image": [("short_vectors.double()", "short_vectors")],
        "transposed_image": [("result += long", "result = long")],
    },
    ("mica/subspace/gram.py", "tests/mica/subspace/test_solver.py", "-k", "squares_leave_the_range"): {
        "extremes": [("out=(result[0], result[1])", "out=(result[0], result[0])")],
    },
    ("mica/subspace/host.py", "tests/mica/subspace/test_gram.py"): {
        "partial_eigenvectors": [("if vectors is not None:", "if True:"), ("[:, :count]", "[:, -count:]")],
        "HostGram.__init__": [("into=buffer)\n            else", ")\n            else")],
        "HostGram.apply": [("self._show(self._diagonal)", "pass")],
        "HostGram.solve": [("self._show(self._factor_diagonal)", "pass")],
        "HostGram.smallest": [("self._show(self._diagonal)", "pass")],
        "HostGram.eigenvalues": [("self._show(self._diagonal)", "pass")],
        "HostGram.orthonormal": [("SAFE_PIVOTS * pivots.max()", "0"), ("norm > 0", "True")],
        "HostGram._mirror": [("block + block.T", "block"), ("self._diagonal - shift", "self._diagonal")],
    },
    ("mica/subspace/spectrum.py", "tests/mica/subspace/test_gram.py", "-k", "singular_value or spectrum"): {
        "squared_norm": [("block.square()", "block")],
        "spectrum": [(".clamp_min(floor)", ".clamp_min(0)"), (".flip(0)", "")],
        "_triangle": [("torch.cat([triangle, block.double()])", "block.double()")],
        "_tall": [("weight.shape[0] >= weight.shape[1]", "True")],
    },
    ("mica/subspace/lapack.py", "tests/mica/subspace/test_lapack.py"): {
        "_has_contiguous_columns": [("step == 8 and", ""), ("stride % 8 == 0", "False")],
        "routine": [
            ('signature.count(b",") + 1 != count', "False"),
            ("argument.strides[1] // 8", "len(argument)"),
        ],
        "_written": [("or not matrix.flags.writeable", "")],
        "gemm": [("beta = 0.0", "beta = 1.0"), ("beta = 1.0", "beta = 0.0")],
        "syrk": [("_LOWER if lower else _UPPER", "_UPPER")],
        "symm": [("_dsymm(_LEFT, _LOWER", "_dsymm(_LEFT, _UPPER")],
        "potrf": [
            ("transposed=True, alpha=-1.0", "transposed=True, alpha=1.0"),
            ("return False", "return True"),
        ],
        "smallest_eigenvectors": [("or found != count", ""), ("np.array(matrix,", "np.asarray(matrix,")],
    },
    ("mica/subspace/many.py", "tests/mica/subspace/test_many.py"): {
        "solve_many": [
            ("on_host.extend(chunk)", "pass"),
            ("task.weight.dtype, task.rank].append", "task.weight.dtype].append"),
            ("missing.append(index)", "missing[:] = [index]"),
            ('where.type == "cpu" and target is not None', "False"),
        ],
        "Task.key": [("fingerprint(self.weight)", "fingerprint(self.weight[:1])")],
        "_kept": [("cache.put(task.weight, result, key=task.key)", "pass")],
        "_look_up": [("return cache.get", "cache.get")],
        "_solved": [("{name}: {error}", "{error}")],
        "accelerator": [("or is_on_host(device)", "")],
    },
    ("mica/subspace/threads.py", "tests/mica/subspace/test_threads.py"): {
        "blas_threads": [
            ("_requested.remove(count)", "pass"),
            ("if not _requested:", "if True:"),
        ],
        "_apply": [("min(_requested, default=before)", "max(_requested, default=before)")],
        "set_torch_threads": [("set_own(count)", "torch.set_num_threads(count)")],
        "one_pool": [("_here.is_one_pool = False", "pass"), ("set_torch_threads(threads)", "pass")],
        "is_small": [('weight.device.type == "cpu" and', "")],
        "run": [("len(parallel), MOST_WORKERS", "len(parallel)")],
        "_in_parallel": [
            ("pool.shutdown(cancel_futures=True)", "pass"),
            ("set_torch_threads, (1,)", "set_torch_threads, (2,)"),
        ],
    },
    ("mica/subspace/solver.py", "tests/mica/subspace/test_solver.py", "-k", "rank or weights or lazily"): {
        "solve_each": [("in_memory(weight.detach())", "weight.detach()")],
        "_check_rank": [("isinstance(rank, bool) or", "")],
        "_check_weight": [("weight.layout is not torch.strided or weight.is_nested", "False")],
    },
    ("mica/row_fingerprints.py", "tests/mica/test_row_fingerprints.py"): {
        "_odd_numbers": [
            ("| 1", "* 0 + 1"),
            ("torch.Generator().manual_seed(0)", "torch.default_generator"),
            (".manual_seed(0)", ".manual_seed(torch.initial_seed())"),
        ],
        "_word_of": [("matrix.element_size() == 8", "False")],
        "_viewed": [
            ("rows.contiguous()", "rows"),
            (".contiguous().view(-1)", ".contiguous()"),
            ("flat = flat.clone()", "pass"),
        ],
    },
    ("mica/row_fingerprints.py", "tests/mica/subspace/test_waits.py", "-k", "fingerprint"): {
        "row_fingerprints": [(", non_blocking=True", "")],
    },
    ("mica/subspace/fingerprint.py", "tests/mica/subspace/test_solver.py", "-k", "lazily"): {
        "_in_memory": [("in_memory(weight.detach())", "weight.detach()")],
    },
    ("mica/subspace/fingerprint.py", "tests/mica/subspace/test_waits.py"): {
        "_digests": [("rows.split(_COPIED_CHUNKS * step)", "rows.split(step)")],
    },
    ("mica/subspace/fingerprint.py", "tests/mica/subspace/test_fingerprint.py"): {
        "_in_memory": [
            ("bits = bits.T", "pass"),
            ("{tuple(weight.shape)} {order}", "{order}"),
            ("{tuple(weight.shape)} {order}", "{tuple(weight.shape)}"),
            ("{weight.dtype} {tuple", "{tuple"),
        ],
        "quick_fingerprint": [
            ("header + sums.tobytes()", "sums.tobytes()"),
            ("header + sums.tobytes()", "header"),
        ],
        "is_weight": [("and weight.numel() > 0", "")],
    },
    ("mica/subspace/device.py", "tests/mica/subspace/test_device.py", "tests/mica/subspace/test_waits.py"): {
        "_solved": [("in (False, True)", "in (False,)")],
        "batch_size": [
            ("min(MOST_AT_ONCE, ", "max(1, "),
            (">= ALONE_FROM", "> ALONE_FROM"),
            ("SHARE_OF_FREE * free_memory(device)", "free_memory(device)"),
            ("weights + ", ""),
        ],
        "free_memory": [("[0] + held", "[0]")],
    },
}
