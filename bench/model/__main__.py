"""``python -m bench.model``: a table of figures modelled by `bench.model.roofline`.

It is ``bench/results/modelled/h100.txt``, to be written again after a change of configurations.
"""

from __future__ import annotations

from bench.model.roofline import H100, Layer, compare

SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (512, 4096, 4096))  # M, N, K
RANK = 16


def shapes() -> list[dict]:
    """All that is modelled."""
    return [compare(Layer(*shape, RANK, H100.target), H100) for shape in SHAPES]


def table() -> str:
    rows = shapes()
    rates = [f"{H100.tensor / 1e12:g} TF/s bf16", f"{H100.fp32 / 1e12:g} TF/s fp32"]
    rates += [f"{H100.bandwidth / 1e12:g} TB/s", f"{H100.gap * 1e6:g} us between launches"]
    gemm = rows[0]["triton_gemm"]
    lines = [f"MODELLED, not measured: h100, rank {RANK}, our GEMM {gemm} x vendor's"]
    lines.append(f"assumed: {', '.join(rates)}")
    for row in rows:
        title = "MODELLED {m} x {n} x {k} (M x N x K)".format(**row)
        shares = "h {h:.1f}, g {g:.1f}, dA {dA:.1f}".format(**row["partials_percent"])
        lines += [
            f"\n{title}: base GEMM {row['base_us']['forward']:.1f} us; partial sums, % of bytes: {shares}",
            f"  {'% over the base':<49}{'forward':>9}{'backward':>10}{'both':>8}{'saved MB':>10}",
        ]
        for form, cost in row["forms"].items():
            numbers = "{forward:>9.1f}{backward:>10.1f}{both:>8.1f}".format(**cost["percent"])
            lines.append(f"  {form:<49}{numbers}{cost['saved_bytes'] / 1e6:>10.1f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
