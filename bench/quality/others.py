"""What others measured: MiCA against LoRA, each with where it was published. None of it by this code."""

from __future__ import annotations

HEADER = ["who", "task", "MiCA", "LoRA", "what to know"]
OTHERS = [
    [
        "the authors, arXiv 2604.01694",
        "continued pretraining on documents, then questions about them; Llama-2-7B and others",
        "“up to 5.9x improvement in knowledge acquisition”",
        "",
        "“under optimized training hyperparameters”, with 6 to 60 % of LoRA's trained parameters",
    ],
    [
        "PEFT, `method_comparison/MetaMathQA`, commit 5d602fd",
        "task tuning: MetaMathQA, then GSM8K, Llama-3.2-3B, 5000 steps, q_proj and v_proj, r = 32",
        "43.1 % right; loss on other text rises by 0.079",
        "47.8 % right; loss on other text rises by 0.050",
        "one seed; learning rate 1e-4 for both, a fifth of the lowest in the paper's range for MiCA",
    ],
    [
        "Ad22n1/LoRA_GPU, `protocols/ADDENDUM_real_mica_2.md`, commit f579187",
        "task tuning: OpenBookQA, Qwen2.5-1.5B, seven layers of each block",
        "r = 16, by the paper's recipe: 3.7 points behind",
        "r = 7, the same number of trained parameters",
        "five seeds, registered in advance; LoRA by its own recipe, with 600,000 tokens against 417,792",
    ],
]
