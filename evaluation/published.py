"""Published figures, to be printed beside ours. The invariant: nothing computes with these.

Clinical LLaMA-LoRA (arXiv 2307.03042, first two versions): AUROC in percent, of notes cut at 128
tokens. The paper's macro averages are not its rows' means in three rows (LLaMA's head, BlueBERT by
LoRA, PMC-LLaMA with the frozen clinical adapter); here the mean is always computed from the row.
MedAlpaca: the tables of the repository kbressem/medAlpaca. Of the M42 study (arXiv 2409.14988) no
figure of a benchmark is known here, so there is none.
"""

from collections.abc import Mapping

TASKS = ("pmv", "mor", "los", "diag", "proc")

# Table 1: notes in train, validation, test.
NOTES: Mapping[str, tuple[int, int, int]] = {
    "pmv": (5_666, 707, 706),
    "mor": (33_954, 4_908, 9_822),
    "los": (30_421, 4_391, 8_797),
    "diag": (33_994, 4_918, 9_829),
    "proc": (30_030, 4_357, 8_681),
}

# Table 2: (base, method): trainable parameters, train perplexity, test perplexity, hours.
ADAPTATION: Mapping[tuple[str, str], tuple[int, float, float, float]] = {
    ("llama", "lora"): (8_388_608, 1.858, 2.244, 21.63),
    ("llama", "adaption-prompt"): (1_228_830, 2.561, 2.865, 24.95),
    ("llama", "prefix"): (5_242_880, 2.815, 2.748, 20.19),
    ("llama", "prompt"): (61_440, 4.846, 4.007, 23.46),
    ("llama", "p-tuning"): (16_093_696, 2.723, 3.271, 23.83),
    ("pmc-llama", "lora"): (2_097_152, 1.938, 2.404, 21.55),
    ("pmc-llama", "adaption-prompt"): (1_228_830, 2.374, 2.867, 23.55),
    ("pmc-llama", "prefix"): (2_621_440, 1.789, 2.848, 20.22),
    ("pmc-llama", "prompt"): (40_960, 4.821, 4.385, 22.42),
    ("pmc-llama", "p-tuning"): (2_171_392, 3.491, 4.572, 22.47),
}

# Tables 3 and 4: (base, variant): AUROC of the tasks in the order of TASKS.
OUTCOMES: Mapping[tuple[str, str], tuple[float, float, float, float, float]] = {
    ("bluebert", "full"): (53.12, 76.95, 66.36, 73.81, 77.70),
    ("umlsbert", "full"): (55.49, 75.87, 66.06, 64.34, 74.19),
    ("bio-clinicalbert", "full"): (54.49, 72.92, 65.13, 65.97, 71.73),
    ("core", "full"): (52.11, 71.52, 64.17, 72.40, 72.73),
    ("bluebert", "lora"): (55.77, 81.90, 70.48, 70.66, 78.10),
    ("umlsbert", "lora"): (56.59, 80.33, 69.03, 69.68, 77.53),
    ("bio-clinicalbert", "lora"): (56.13, 78.81, 68.28, 68.53, 75.19),
    ("core", "lora"): (55.31, 79.27, 68.18, 67.34, 72.36),
    ("llama", "head"): (51.38, 66.80, 57.65, 60.06, 63.83),
    ("llama", "lora"): (51.65, 74.89, 65.70, 78.37, 87.49),
    ("llama", "frozen"): (51.62, 65.66, 58.16, 63.47, 69.01),
    ("llama", "frozen+downstream"): (51.11, 66.00, 58.04, 60.46, 65.30),
    ("llama", "trainable"): (55.76, 74.81, 64.83, 76.07, 82.76),
    ("llama", "trainable+downstream"): (56.72, 76.99, 65.86, 78.29, 86.17),
    ("pmc-llama", "head"): (53.06, 66.77, 57.94, 60.17, 64.63),
    ("pmc-llama", "lora"): (53.84, 78.03, 66.14, 78.81, 86.68),
    ("pmc-llama", "frozen"): (51.33, 67.19, 58.13, 63.59, 68.26),
    ("pmc-llama", "frozen+downstream"): (50.90, 67.00, 58.31, 60.50, 64.42),
    ("pmc-llama", "trainable"): (52.88, 75.86, 65.89, 79.66, 86.85),
    ("pmc-llama", "trainable+downstream"): (52.21, 76.54, 68.42, 78.67, 87.08),
}

# MedAlpaca ----------------------------------------------------------------------------------------

# (base, row): zero-shot accuracy of USMLE self-assessment steps 1, 2 and 3. An answer is drawn up
# to five times until it can be read. How many questions were scored is not stated and differs
# between rows.
USMLE: Mapping[tuple[str, str], tuple[float, float, float]] = {
    ("llama-7b", "base"): (0.198, 0.202, 0.203),
    ("llama-7b", "full"): (0.297, 0.312, 0.398),
    ("llama-7b", "lora"): (0.231, 0.202, 0.179),
    ("llama-7b", "lora-8bit"): (0.231, 0.241, 0.211),
    ("llama-13b", "base"): (0.222, 0.248, 0.276),
    ("llama-13b", "full"): (0.473, 0.477, 0.602),
    ("llama-13b", "lora"): (0.250, 0.255, 0.255),
    ("llama-13b", "lora-8bit"): (0.189, 0.303, 0.289),
    ("llama-30b", "lora-8bit"): (0.315, 0.327, 0.361),
}
# The same of models that are no cell of the study.
USMLE_OTHERS: Mapping[str, tuple[float, float, float]] = {
    "Alpaca 7B": (0.275, 0.266, 0.293),
    "Alpaca 7B, LoRA": (0.220, 0.138, 0.252),
    "ChatDoctor": (0.187, 0.185, 0.148),
    "Alpaca 13B": (0.319, 0.312, 0.301),
}
# (base, row): GB of GPU memory, and seconds an epoch over about 6,000 rows on one GPU.
FOOTPRINT: Mapping[tuple[str, str], tuple[float, int]] = {
    ("llama-7b", "full"): (79.5, 35 * 60 + 30),
    ("llama-7b", "lora"): (18.8, 14 * 60 + 30),
    ("llama-7b", "lora-8bit"): (8.9, 77 * 60 + 30),
}
