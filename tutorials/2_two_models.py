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
# At the end you have a Dedicated Feature Crosscoder on two language models that share nothing, neither architecture nor width nor
# tokenizer, saved in a folder that tutorials 3 and 4 open. You have seen every step between the text and that folder, and
# what it must be held against: a crosscoder without a partition, and the same crosscoder on a pair in which there is nothing to find.
#
# - **Time**: about 3 minutes on 2 CPU cores. **Memory**: 3 GB. No model hub is reached: the models come from the package index, the
#   text is the documentation that Python brings with it.
# - **Expect**: nine in ten tokens pair; explained variance about 0.73 for SmolLM2 and 0.82 for Gemma, as of a BatchTopK
#   crosscoder; and exclusive latents that are alive on the null pair too, which is why nothing here calls one a finding yet. That is
#   tutorial 3.
#
# The steps are those of the package, in the order in which its files stand: models, tokens, alignment, activations, shuffled batches,
# crosscoder, training, measures.

# %% tags=["parameters"]
folder = "runs/tutorial-2"  # everything that is written
text = "cpython-docs"  # comes with Python; a hub name, a file or a folder of yours does too
context_size = 128  # tokens that a model reads at once
max_unique_pairs = (
    48_000  # distinct places in the text to train on; half of the demo's, to be done in minutes
)
training_tokens = (
    204_800  # the same, repeats counted: 200 steps of 1,024, so each place is seen four times
)
eval_pairs = 8_000  # places in documents that are kept from training
d_sae = 2048  # latents, three times as many as either model is wide
k = 32  # of these active at a place, on average
seed = 42  # of weights and shuffle

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
# A `ModelConfig` says where a model comes from and where it is read; without a hook name that is the output of its middle block. For your own
# pair write `ModelConfig("Qwen/Qwen3-0.6B", hook_name="blocks.14.hook_resid_post")`. A `ModelPair` opens both and checks that they can be
# compared. What it says of them is kept with every crosscoder, and a crosscoder refuses other models later.

# %%
model_a, model_b = demo_models(DemoConfig())
pair = ModelPair.load(model_a, model_b)
described = pd.DataFrame(pair.describe())
described.map(lambda value: f"{value[:12]}…" if len(str(value)) == 64 else value)

# %% [markdown]
# ## Tokens, and where they agree
#
# The two tokenizers cut one text differently. Two positions are a pair when **both models have read exactly the same text**, that is when
# both tokens end at the same character. So the text falls into *segments*, each ending in a pair. Below, one segment a column; a token in
# grey has no partner and is left out: its model stands there at a place where the other never stands.


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
# No rule knows a model's name or a language: characters decide. Each token that is left out is counted, with the reason.


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
# One dataclass holds every setting, SAELens' names wherever SAELens has them. Its first half says what is read: here two models and a
# text, of which every tenth document is kept from training.

# %%
cfg = CrosscoderRunnerConfig(
    model_a=model_a,
    model_b=model_b,
    dataset_path=text,
    context_size=context_size,
    max_unique_pairs=max_unique_pairs,
    eval_pairs=eval_pairs,
    # The second half: how a crosscoder is trained on it.
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
# How much of it pairs? Over the first 40 documents:

# %%
coverage = Coverage()
for document, _ in zip(load_texts(text), range(40)):
    coverage.add(pair.segments(document)[1])
reasons(coverage)

# %% [markdown]
# Nine in ten tokens of either model. Most of the rest are places where one model has one token for what is several to the other.
#
# ## Paired activations
#
# `PairedText` cuts documents into contexts at places where both tokenizers agree, sends each context through both models up to their hooks, and
# keeps the activations at the pairs, side by side: **a row is `[x_a | x_b]`**, the input of a SAELens SAE of width `d_a + d_b`. That is the one idea of the
# package: everything after this step is an SAE whose input happens to come from two models.

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
# Position 0 is left out by position (it is an outlier whatever token stands there), and so is a pair of which either norm is over
# twice its model's median: attention sinks would take the crosscoder's attention too.
#
# Now all of it, training and held-out documents, into memory. (With more text than memory holds, `sae-lens-dfc cache` writes it to disk, or the runner
# reads it as it trains.)

# %%
data = PairData.collect(PairedText(cfg, pair), "The two models")
acts = torch.cat([rows.acts for rows in data.training])
print(f"Training: {len(acts):,} rows; held out: {sum(len(r.acts) for r in data.held_out):,}")
print(f"Left out as outliers: {data.metrics['alignment/outlier']}")

# %% [markdown]
# ## Why each model has its own mean and scale
#
# The two models' activations differ in size, and most of Gemma's is its mean, which says nothing about the text. Left as they are, or scaled by
# one number for both, the louder model would be rebuilt and the other not. So each model's mean is taken off and each gets one scale, such
# that both have the same variance in training. The scales are folded into the weights at the end: a saved crosscoder takes raw activations.

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
for ax, values, title in zip(axes, (norms, centered), ("as they are", "without each model's mean")):
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
# A DFC is a BatchTopK crosscoder in which some latents may use one model only: they read and write `x_a` alone, or `x_b` alone. Their other
# weights are exact zeros that take part in no product. Which latents these are is all there is to the architecture:

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
# Rows come shuffled from a buffer, `CrosscoderTrainingRunner` fits mean and scale and trains, with Adam and SAELens' schedules. `CrosscoderTrainingRunner(cfg).run()` does all of
# this page by itself; models that are open and rows that are in memory can be handed to it, as here, so that neither is made again.

# %%
trained = CrosscoderTrainingRunner(cfg, pair, data.training).run()
crosscoder = trained.to_inference()
print("Scale of each model in training:", [f"{x:.4f}" for x in crosscoder.input_scale.tolist()])
print("Largest weight that should be zero:", crosscoder.leak())

# %% [markdown]
# ## What to hold it against
#
# Two more crosscoders, with the same settings and as many steps: the **baseline**, BatchTopK without a partition, says what the partition costs. The **null** is the same DFC on model
# A twice, where nothing is exclusive: whatever its exclusive latents do there, they do for no reason.

# %%
case = PairTask(cfg, pair, data)
baseline = train_crosscoder(
    case._replace(cfg=replace(cfg, sae=like(cfg.sae, BatchTopKTrainingCrosscoderConfig)))
)
null = null_case("self", case)
null_crosscoder = train_crosscoder(null)

# %% [markdown]
# ## What came out, on held-out text
#
# Explained variance of each model by all latents, and how much of it is lost when a partition's latents are set to zero. ± is the standard error
# over the text (not over trainings: for that, [benchmarks/README.md](../benchmarks/README.md) has seeds).


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
# The partition costs next to nothing: all latents together explain what the baseline's do. Without its exclusive latents SmolLM2 loses 0.01, Gemma 0.001; on the null, where they have no business, either side loses 0.002. How often are they used, and are they
# alive?

# %%
measured = {
    name: evaluate(one, [rows.acts for rows in on.held_out]).metrics
    for name, (one, on) in cases.items()
}
keys = {
    "l0": "active latents on a pair",
    "l0/a_exclusive": "of these exclusive to A",
    "l0/b_exclusive": "of these exclusive to B",
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
# Read it from the right. On model A twice there is nothing exclusive, and four in five of the exclusive latents are alive all the same: **that a latent sits in an exclusive partition and fires
# is no evidence.** How much a partition is used says a little: SmolLM2's four times as much as the null's, Gemma's only half as much. Whether any single latent is one model's alone
# is the question of tutorial 3.
#
# ## The folder
#
# It holds the crosscoder in SAELens' format and the settings. `SAE.load_from_disk` opens it once `sae_lens_dfc` is imported, and it takes raw activations.

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
# or `sae-lens-dfc demo`, which takes these two models, trains baseline and null beside them and writes a page to read. Any command takes the folder
# that was just written; `evaluate` refuses models other than those of the training, and measures on held-out text:
#
# ```
# sae-lens-dfc evaluate runs/tutorial-2/run --eval-pairs 2000
# ```
#
# **Next**: [3, reading latents and their evidence](3_reading_latents.ipynb).
