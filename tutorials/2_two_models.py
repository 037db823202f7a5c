# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Two real models, from text to a trained DFC
#
# This tutorial trains a Dedicated Feature Crosscoder on two language models that differ in architecture, width and
# tokenizer, and saves it in a folder that tutorials 3 and 4 load. It shows every step between the text and that folder, and
# the two comparisons that the result needs: a crosscoder without a partition, and the same crosscoder on a pair without differences.
#
# - **Time**: about 3 minutes on 2 CPU cores. **Memory**: 3 GB. No model hub is needed: the models come from the package index, and the
#   text is the documentation that ships with Python.
# - **Expect**: nine in ten tokens pair. Explained variance is about 0.73 for SmolLM2 and 0.82 for Gemma, the same as for a BatchTopK
#   crosscoder. Exclusive latents are alive on the null pair too, so this tutorial does not yet report any of them as a finding;
#   tutorial 3 does the tests.
#
# The steps follow the order of the package's folders: models, tokens, alignment, activations, shuffled batches,
# crosscoder, training, metrics.

# %% tags=["parameters"]
folder = "runs/tutorial-2"  # output folder
text = "cpython-docs"  # ships with Python; a hub name, a file or a folder works too
context_size = 128  # tokens per context
max_unique_pairs = 48_000  # distinct training pairs, as many as the demo's
training_tokens = (
    204_800  # training pairs, repeats included: 200 steps of 1,024, so each pair is seen four times
)
eval_pairs = 8_000  # pairs from documents held out from training
d_sae = 2048  # latents, about three times either model's width
k = 32  # active latents per pair, on average
seed = 42  # for weights and shuffling

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import HTML, display
from sae_lens import SAE

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoderConfig,
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DFCTrainingCrosscoderConfig,
    ModelPair,
)
from sae_lens_dfc.analysis.evaluation.baselines import like
from sae_lens_dfc.analysis.evaluation.demo import demo_models
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.evaluation.measure import train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.data.alignment.align import REASONS, Coverage
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.datasets import load_texts
from sae_lens_dfc.metrics.evaluate import evaluate
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance
from sae_lens_dfc.models.decoding import spelled

pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.3f}".format

# %% [markdown]
# ## Two models
#
# A `ModelConfig` names a model and its hook; the default hook is the output of the middle block. For your own
# pair write `ModelConfig("Qwen/Qwen3-0.6B", hook_name="blocks.14.hook_resid_post")`. A `ModelPair` loads both models and checks that they can be
# compared. Its description is saved with every crosscoder, and a crosscoder later rejects other models.

# %%
model_a, model_b = demo_models(DemoConfig())
pair = ModelPair.load(model_a, model_b)
described = pd.DataFrame(pair.describe())
described.map(lambda value: f"{value[:12]}…" if len(str(value)) == 64 else value)

# %% [markdown]
# ## Token alignment
#
# The two tokenizers split the same text differently. Two positions form a pair if **both models have read exactly the same text**, that is, if
# both tokens end at the same character. The text thus falls into *segments*, each of which ends in a pair. Below, each column is a segment. A token in
# grey has no partner and is skipped: its model is at a position where the other model never is.


# %%
def shown(tokens: list[str]) -> str:
    *left_out, paired = (token.replace(" ", "␣") for token in tokens)
    return "".join(f'<span style="color:#aaa">{t}|</span>' for t in left_out) + f"<b>{paired}</b>"


sentence = "In 1989 the naïve tokenizer cost £3.50, unbelievably! 🦙"
segments, coverage = pair.segments(sentence)
aligned = pd.DataFrame(
    {
        model.name: map(shown, spelled(model.tokenizer, ids))
        for model, ids in (
            (pair.a, [s.ids_a for s in segments]),
            (pair.b, [s.ids_b for s in segments]),
        )
    }
)
display(HTML(aligned.T.to_html(escape=False, header=False)))

# %% [markdown]
# The rule depends only on characters, not on a model's name or a language. Every skipped token is counted with its reason.


# %%
def reasons(coverage: Coverage) -> pd.DataFrame:
    rows = {
        "paired": [coverage.pairs] * 2,
        "share paired": [f"{coverage.a:.1%}", f"{coverage.b:.1%}"],
    }
    for reason in sorted({*coverage.dropped_a, *coverage.dropped_b}):
        rows[REASONS[reason]] = [coverage.dropped_a[reason], coverage.dropped_b[reason]]
    return pd.DataFrame(rows.values(), index=list(rows), columns=[pair.a.name, pair.b.name])


reasons(coverage)

# %% [markdown]
# ## The text
#
# One dataclass holds every setting, with SAELens' names wherever SAELens has them. Its first half defines the data: two models and a
# text, of which every tenth document is held out from training.

# %%
cfg = CrosscoderRunnerConfig(
    model_a=model_a,
    model_b=model_b,
    dataset_path=text,
    context_size=context_size,
    max_unique_pairs=max_unique_pairs,
    eval_pairs=eval_pairs,
    # The second half: the crosscoder and its training.
    sae=DFCTrainingCrosscoderConfig(
        d_a=pair.d_a, d_b=pair.d_b, d_sae=d_sae, k=k, topk_threshold_lr=0.05
    ),
    training_tokens=training_tokens,
    train_batch_size_tokens=1024,
    n_batches_in_buffer=32,
    lr=1e-3,
    lr_warm_up_steps=training_tokens // 1024 // 6,
    lr_decay_steps=training_tokens // 1024 // 5,
    dead_feature_window=training_tokens // 1024 // 6,
    seed=seed,
    output_path=f"{folder}/run",
    overwrite=True,
)

# %% [markdown]
# The share of tokens that pair, over the first 40 documents:

# %%
coverage = Coverage()
for document, _ in zip(load_texts(text), range(40)):
    coverage.add(pair.segments(document)[1])
reasons(coverage)

# %% [markdown]
# Nine in ten tokens of either model pair. Most of the others are positions where one model has a single token and the other several.
#
# ## Paired activations
#
# `PairedText` splits documents into contexts at positions where both tokenizers agree, runs both models on each context up to their hooks, and
# concatenates the activations at the pairs. **A row is `[x_a | x_b]`**, the input of a SAELens SAE of width `d_a + d_b`. This is the central idea of the
# package: every later step is an SAE whose input comes from two models.

# %%
counts = PairCounts()
rows = next(PairedText(cfg, pair).rows("held_out", counts))
print(
    f"One batch: {len(rows.contexts)} contexts, rows {tuple(rows.acts.shape)} = (n, {pair.d_a} + {pair.d_b})"
)
print(f"Row 100 is segment {rows.segment[100]} of context {rows.context[100]}")
pd.Series(
    {name: n for name, n in vars(counts).items() if isinstance(n, int)}, name="counts"
).to_frame().T

# %% [markdown]
# Position 0 is skipped, because its activation is an outlier for every token. A pair is skipped as an outlier if the norm of either activation exceeds
# twice its model's median, because attention sinks would dominate the crosscoder's loss.
#
# The next cell collects all training and held-out rows in memory. (For text that does not fit in memory, `sae-lens-dfc cache` writes the rows to disk, or the runner
# reads the text during training.)

# %%
data = PairData.collect(PairedText(cfg, pair), "The two models")
acts = torch.cat([rows.acts for rows in data.training])
print(f"Training: {len(acts):,} rows; held out: {sum(len(r.acts) for r in data.held_out):,}")
print(f"Left out as outliers: {data.metrics['alignment/outlier']}")

# %% [markdown]
# ## Why each model has its own mean and scale
#
# The two models' activations differ in norm, and most of Gemma's norm is its mean, which carries no information about the text. With raw activations, or one
# scale for both models, the crosscoder would reconstruct the model with the larger norm and neglect the other. So each model's mean is subtracted, and each model
# gets one scale that gives both the same variance in training. The scales are folded into the weights at the end: a saved crosscoder takes raw activations.

# %%
norms = {
    m: acts[:, where].norm(dim=1)
    for m, where in (("a", slice(0, pair.d_a)), ("b", slice(pair.d_a, None)))
}
centered = {
    m: (acts[:, where] - acts[:, where].mean(dim=0)).norm(dim=1)
    for m, where in (("a", slice(0, pair.d_a)), ("b", slice(pair.d_a, None)))
}
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for ax, values, title in zip(axes, (norms, centered), ("raw", "centered")):
    for m, name in (("a", pair.a.name), ("b", pair.b.name)):
        ax.hist(values[m].numpy(), bins=80, alpha=0.7, label=name)
    ax.set(xlabel=f"norm of an activation, {title}", yticks=[])
axes[0].legend()
plt.show()
share = {m: 1 - (centered[m].pow(2).mean() / norms[m].pow(2).mean()).item() for m in norms}
print("Share of the squared norm that is the mean:", {m: f"{x:.2f}" for m, x in share.items()})

# %% [markdown]
# ## The crosscoder
#
# A DFC is a BatchTopK crosscoder in which some latents may use one model only: they read and write `x_a` alone, or `x_b` alone. Their weights for the other
# model are exact zeros and take part in no matrix product. The partition defines which latents these are; it is the whole difference between the two architectures:

# %%
pd.DataFrame(
    {
        name: {"latents": size, "first": cfg.sae.partition.slices[name].start}
        for name, size in cfg.sae.partition.sizes.items()
    }
).T

# %% [markdown]
# ## Training
#
# Rows are shuffled in a buffer. `CrosscoderTrainingRunner` fits the mean and scale and then trains, with Adam and SAELens' schedules. `CrosscoderTrainingRunner(cfg).run()` alone does
# everything on this page. Here it also gets the loaded models and the rows in memory, so that they are not created again.

# %%
trained = CrosscoderTrainingRunner(cfg, pair, data.training).run()
crosscoder = trained.to_inference()
print("Scale of each model in training:", [f"{x:.4f}" for x in crosscoder.input_scale.tolist()])
print("Largest weight that should be zero:", crosscoder.max_forbidden_weight())

# %% [markdown]
# ## Baseline and null
#
# Two more crosscoders are trained with the same settings and the same number of steps. The **baseline**, BatchTopK without a partition, shows what the partition costs. The **null** is the same DFC on
# model A twice, where nothing is exclusive: any activity of its exclusive latents is an artifact.

# %%
case = PairTask(cfg, pair, data)
baseline = train_crosscoder(
    case._replace(cfg=replace(cfg, sae=like(cfg.sae, BatchTopKTrainingCrosscoderConfig)))
)
null = null_case("self", case)
null_crosscoder = train_crosscoder(null)

# %% [markdown]
# ## Results on held-out text
#
# The table shows each model's explained variance with all latents, and without the latents of one partition (ablated to zero). ± is the standard error
# over the text. It does not include the variation between trainings; [benchmarks/README.md](../benchmarks/README.md) has several seeds.


# %%
@torch.no_grad()
def explained(crosscoder, rows, silenced=None) -> dict[str, str]:
    variance = ExplainedVariance(crosscoder.partition)
    for batch in rows:
        feature_acts = crosscoder.encode(batch.acts)
        if silenced is not None:
            feature_acts[:, crosscoder.partition.slices[silenced]] = 0
        variance.update(batch.acts, crosscoder.decode(feature_acts))
    found = variance.compute()
    return {
        model: f"{found[f'explained_variance/{m}']:.3f} ± {found[f'explained_variance/{m}/se']:.3f}"
        for m, model in (("a", "A"), ("b", "B"))
    }


cases = {
    "this run": (crosscoder, data),
    "baseline": (baseline, data),
    "null: A twice": (null_crosscoder, null.data),
}
pd.concat(
    {
        name: pd.DataFrame(
            {
                "all latents" if part is None else f"without {part}": explained(
                    one, on.held_out, part
                )
                for part in (None, *(p for p, size in one.partition.sizes.items() if size))
            }
        ).T
        for name, (one, on) in cases.items()
    },
    axis=1,
).fillna("")

# %% [markdown]
# The partition costs almost nothing: all latents together explain as much as the baseline's. Without its exclusive latents SmolLM2 loses 0.01 and Gemma 0.001. On the null, where no latent should be exclusive,
# either side loses 0.002. The next table shows how often the exclusive latents are active, and how many are dead.

# %%
measured = {
    name: evaluate(one, [rows.acts for rows in on.held_out]).metrics
    for name, (one, on) in cases.items()
}
keys = {
    "l0": "active latents per pair",
    "l0/a_exclusive": "of these, A-exclusive",
    "l0/b_exclusive": "of these, B-exclusive",
    "dead_fraction/a_exclusive": "dead share, A-exclusive",
    "dead_fraction/b_exclusive": "dead share, B-exclusive",
    "dead_fraction/shared": "dead share, shared",
}
pd.DataFrame(
    {
        name: {title: f"{m[key]:.3f}" if key in m else "" for key, title in keys.items()}
        for name, m in measured.items()
    }
)

# %% [markdown]
# Compare with the null column. On model A twice nothing is exclusive, yet four in five of the exclusive latents are alive: **a latent that fires in an exclusive partition
# is not evidence of a difference.** The activity of a partition is weak evidence: SmolLM2's is four times the null's, Gemma's only half of it. Tutorial 3 tests whether any single latent is
# exclusive to one model.
#
# ## The saved folder
#
# The folder holds the crosscoder in SAELens' format, and its settings. After `import sae_lens_dfc`, `SAE.load_from_disk` loads it; it takes raw activations.

# %%
run = Path(f"{folder}/run")
opened = SAE.load_from_disk(run)
print(type(opened).__name__, sorted(path.name for path in run.iterdir()))
some = data.held_out[0].acts
print("Same output as before saving:", torch.equal(opened(some), crosscoder(some)))
print("Trained on:", opened.cfg.metadata.model_name, "at", opened.cfg.metadata.hook_name)

# %% [markdown]
# ## The same from a shell
#
# ```
# sae-lens-dfc train --model-a FOLDER_OR_HUB_NAME --model-b FOLDER_OR_HUB_NAME \
#     --max-unique-pairs 48000 --training-tokens 204800 --train-batch-size-tokens 1024 --lr 1e-3 --keep-in-memory \
#     --sae.d-sae 2048 --sae.k 32 --sae.topk-threshold-lr 0.05 --output-path runs/mine
# ```
#
# `sae-lens-dfc demo` runs the same two models, trains the baseline and the null next to them, and writes a report. Every command takes the saved
# folder. `evaluate` rejects models other than those of the training, and evaluates on held-out text:
#
# ```
# sae-lens-dfc evaluate runs/tutorial-2/run --eval-pairs 2000
# ```
#
# **Next**: [3, reading latents and their evidence](3_reading_latents.ipynb).
