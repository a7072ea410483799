"""Runs the PTX that Triton generates on numpy: what kernels compute as compiled (``make emulate``).

A CTA's threads run in lockstep, one numpy array per register; threads that diverge run by the lowest block
first. Global memory is the process's own: only the bytes of the tensors of a launch may be touched, and only
those of its outputs written. Checked, each a `program.FaultError` with its instruction and source line:

- an access outside the launch's tensors, of a gap between their rows, or not aligned to its own size;
- an access outside the shared memory that the kernel asks for;
- a race in shared memory: two accesses of a byte by two threads, one of them a write, with no barrier between
  (`bar.warp.sync` orders a warp). Asynchronous copies are pending from their issue to the wait, are carried
  out as late as possible, and no one may touch their bytes meanwhile;
- a race in global memory: of two threads of a CTA without a barrier, or of two CTAs without a release by the
  one and an acquire by the other;
- an instruction, or a form of one, that is not known here: never skipped;
- barriers and warp-wide instructions that not all of their threads reach; registers that are read unwritten.

Shared memory holds 0xFF at first: NaN in every dtype. Not modelled: what the memory system may reorder (only
whether the synchronisation that forbids it is there), time, and the rounding inside tensor cores (here a
product's sum is formed in fp64 and rounded once to fp32; TF32 operands are cut to 19 bits as in hardware).
Instructions are those of PTX ISA 8.7 that Triton 3.9 generates here for sm_80 and sm_90.
"""
