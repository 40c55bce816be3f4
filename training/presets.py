"""Published recipes as data: each a named function that returns a whole run config of one stage.

A recipe says what its authors' code or text says, and its docstring where that stands and what is
not known. Sources: Clinical LLaMA-LoRA (arXiv 2307.03042 and aryopg/clinical_peft, of whose states
the one of June 2023 is closest to the first two versions of the text); MedAlpaca (arXiv 2304.08247
and kbressem/medAlpaca); Stanford Alpaca (tatsu-lab/stanford_alpaca); Alpaca-LoRA
(tloen/alpaca-lora). What every recipe departs from, because the project does it in one way only, is
in docs/presets.md. The invariant: nothing here depends on the base or the notes, which a user
names, so a recipe is the same on every machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from training.config import (
    AdaptionPromptSettings,
    Int8Settings,
    LoraSettings,
    OptimSettings,
    PrefixSettings,
    Preset,
    PromptSettings,
    PTuningSettings,
    RunConfig,
    Task,
)
from training.stages import clinical, downstream, instruct

# Stage 1 and 2 of the paper: torch's AdamW, no warm-up (a ratio of 0.06 reached the scheduler as
# 0.06 steps), a fall in a line, no clipping.
_PAPER_OPTIM = OptimSettings(schedule="linear", warmup_steps=0, weight_decay=0.01, clip=None)
_PAPER_SEED = 1234
# The settings of "Trainable ++ Downstream LoRA" at 128 tokens, by task: rank, alpha, dropout.
_BEST_DOWNSTREAM: Mapping[Task, tuple[int, float, float]] = {
    "pmv": (16, 32.0, 0.0),
    "mor": (8, 4.0, 0.2),
    "los": (16, 4.0, 0.0),
    "diag": (8, 4.0, 0.1),
    "proc": (2, 8.0, 0.1),
}


# Clinical LLaMA-LoRA ------------------------------------------------------------------------------


def paper_llama() -> RunConfig:
    """Stage 1 on LLaMA-7B; --adapter takes the other methods of the paper's table 2.

    The first 128 tokens of each note, one epoch, 3e-4 for every method. LoRA of rank 16, alpha 32;
    15 prompt tokens; 20 prefix tokens; P-tuning by an LSTM; an adaption prompt of 10 rows in 30 of
    32 layers: ranks are in the configs, the rest is what the published counts imply. The step of
    40 notes (10 x 4) is the code's of May 2023; in June it began with 8 x 4.
    """
    return replace(
        clinical(),
        max_length=128,
        pieces="first",
        batch_tokens=None,
        batch_size=40,
        epochs=1.0,
        lr=3e-4,
        optim=_PAPER_OPTIM,
        lora=LoraSettings(r=16, alpha=32.0, dropout=0.0),
        prompt=PromptSettings(num_virtual_tokens=15),
        prefix=PrefixSettings(num_virtual_tokens=20, projection=False),
        p_tuning=PTuningSettings(
            num_virtual_tokens=20, encoder="lstm", encoder_hidden_size=256, encoder_layers=4
        ),
        adaption_prompt=AdaptionPromptSettings(adapter_len=10, adapter_layers=None),
        keep="last",
        seed=_PAPER_SEED,
    )


def paper_pmc_llama() -> RunConfig:
    """Stage 1 on PMC-LLaMA-7B: as on LLaMA but for the settings of the methods.

    LoRA of rank 4, alpha 4, dropout 0.2; 10 prompt tokens; 10 prefix tokens; P-tuning by an MLP of
    width 256 with 1 token. The base's files lack special tokens, which the authors' code states.
    """
    return replace(
        paper_llama(),
        tokenizer_preset="pmc-llama",
        lora=LoraSettings(r=4, alpha=4.0, dropout=0.2),
        prompt=PromptSettings(num_virtual_tokens=10),
        prefix=PrefixSettings(num_virtual_tokens=10, projection=False),
        p_tuning=PTuningSettings(num_virtual_tokens=1, encoder="mlp", encoder_hidden_size=256),
    )


def paper_outcome() -> RunConfig:
    """Stage 2, any task and any row of the paper's table 3 but those with a preset of their own.

    The first 128 tokens of a note, 20 notes a step (10 x 2 or 2 x 10; the code of June began with
    micro-batches of 8 whatever a config said), 5e-5, ten epochs, the last one's weights, classes
    weighed by N / (K count), labels with the published quirks. Which ranks plain LoRA was given is
    not published: here it is stage 1's.
    """
    return replace(
        downstream(),
        cohort="paper",
        max_length=128,
        truncate="head",
        batch_size=20,
        epochs=10.0,
        lr=5e-5,
        optim=_PAPER_OPTIM,
        lora=LoraSettings(r=16, alpha=32.0, dropout=0.0),
        class_weights=True,
        patience=None,
        keep="last",
        seed=_PAPER_SEED,
    )


def paper_best(task: Task) -> RunConfig:
    """Stage 2, a trained clinical adapter under a downstream LoRA, as the task's "_best" config.

    16 notes a step (8 x 2). The published rows were trained without the second adapter, which the
    authors' code loads but never activates; here both are summed.
    """
    r, alpha, dropout = _BEST_DOWNSTREAM[task]
    lora = LoraSettings(r=r, alpha=alpha, dropout=dropout)
    return replace(paper_outcome(), task=task, batch_size=16, lora=lora)


def paper_lora_mor() -> RunConfig:
    """Stage 2, mortality by LLaMA + LoRA without a clinical adapter: the one row with 3e-4."""
    return replace(paper_outcome(), task="mor", lr=3e-4)


def paper_encoder() -> RunConfig:
    """Stage 2, the BERT rows: all weights, 64 notes a step (32 x 2); --adapter lora for table 4."""
    return replace(paper_outcome(), adapter="full", batch_size=64)


# MedAlpaca ----------------------------------------------------------------------------------------


def medalpaca() -> RunConfig:
    """All weights of LLaMA-7B or -13B on Medical Meadow.

    The authors' example command (256 rows a step, recomputed blocks, bf16) with their earlier
    README's 2e-5, three epochs, cosine, warm-up ratio 0.03 and no decay; the example itself leaves
    the warm-up at train.py's 100 steps. Rows of 256 tokens and a loss on prompts too are train.py's
    defaults. Rates of each size in the paper: not found.
    """
    return replace(
        instruct(),
        adapter="full",
        prompt_format="medalpaca",
        train_on_inputs=True,
        max_length=256,
        batch_size=256,
        epochs=3.0,
        lr=2e-5,
        optim=OptimSettings(schedule="cosine", warmup_ratio=0.03, weight_decay=0.0),
        activations="checkpoint",
        eval_every=200,
    )


def medalpaca_lora() -> RunConfig:
    """LoRA on q and v: train.py's defaults with train_in_8bit off (rank 8, 128 rows a step, 2e-5).

    No source at hand confirms the paper's own figures for LoRA.
    """
    return replace(
        medalpaca(),
        adapter="lora",
        lora=LoraSettings(r=8, alpha=16.0, dropout=0.1),
        batch_size=128,
        optim=OptimSettings(schedule="cosine", warmup_steps=100, weight_decay=0.0),
        activations="save",
    )


def medalpaca_lora_int8() -> RunConfig:
    """The same over an int8 base: train.py's defaults as they are.

    train.py takes torch's AdamW. No source at hand confirms an 8-bit optimizer: that would be
    --optim.states int8.
    """
    return replace(medalpaca_lora(), base_dtype="int8", int8=Int8Settings(compute="int8"))


def medalpaca_lora_int8_13b() -> RunConfig:
    """LLaMA-13B by the repository's early finetune_int8.py: all its settings are Alpaca-LoRA's."""
    return alpaca_lora()


# Alpaca -------------------------------------------------------------------------------------------


def alpaca_7b() -> RunConfig:
    """All weights of LLaMA-7B on Alpaca's rows: 128 rows a step, 2e-5, three epochs, 512 tokens.

    The loss is on responses alone, nothing is validated. An early README says a weight decay of 1,
    the later one and its command 0.
    """
    return replace(
        instruct(),
        adapter="full",
        prompt_format="alpaca",
        train_on_inputs=False,
        max_length=512,
        batch_size=128,
        epochs=3.0,
        lr=2e-5,
        optim=OptimSettings(schedule="cosine", warmup_ratio=0.03, weight_decay=0.0),
        keep="last",
    )


def alpaca_13b() -> RunConfig:
    """All weights of LLaMA-13B: as 7B, with 1e-5 and five epochs."""
    return replace(alpaca_7b(), lr=1e-5, epochs=5.0)


def alpaca_lora() -> RunConfig:
    """LoRA over an int8 LLaMA-7B: finetune.py's defaults.

    The schedule and the decay are the trainer's defaults, a line and 0; prompts are learned too;
    the best of the validations every 200 steps is kept.
    """
    return replace(
        instruct(),
        base_dtype="int8",
        int8=Int8Settings(compute="int8"),
        lora=LoraSettings(r=8, alpha=16.0, dropout=0.05),
        prompt_format="alpaca",
        train_on_inputs=True,
        max_length=256,
        batch_size=128,
        epochs=3.0,
        lr=3e-4,
        optim=OptimSettings(schedule="linear", warmup_steps=100, weight_decay=0.0),
        eval_every=200,
    )


def alpaca_lora_r16() -> RunConfig:
    """The later official adapter: rank 16 on all of attention, ten epochs, 512 tokens.

    What its command leaves out is finetune.py's default.
    """
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora = LoraSettings(r=16, alpha=16.0, dropout=0.05, target_modules=modules)
    return replace(alpaca_lora(), lora=lora, max_length=512, epochs=10.0)


_RECIPES: Mapping[Preset, Callable[[], RunConfig]] = {
    "paper-llama": paper_llama,
    "paper-pmc-llama": paper_pmc_llama,
    "paper-outcome": paper_outcome,
    "paper-outcome-pmv": partial(paper_best, "pmv"),
    "paper-outcome-mor": partial(paper_best, "mor"),
    "paper-outcome-los": partial(paper_best, "los"),
    "paper-outcome-diag": partial(paper_best, "diag"),
    "paper-outcome-proc": partial(paper_best, "proc"),
    "paper-lora-mor": paper_lora_mor,
    "paper-encoder": paper_encoder,
    "medalpaca": medalpaca,
    "medalpaca-lora": medalpaca_lora,
    "medalpaca-lora-int8": medalpaca_lora_int8,
    "medalpaca-lora-int8-13b": medalpaca_lora_int8_13b,
    "alpaca-7b": alpaca_7b,
    "alpaca-13b": alpaca_13b,
    "alpaca-lora": alpaca_lora,
    "alpaca-lora-r16": alpaca_lora_r16,
}


def recipe(name: Preset) -> RunConfig:
    """The preset of that name."""
    return replace(_RECIPES[name](), preset=name)
