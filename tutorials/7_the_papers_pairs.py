# %% [markdown]
# # 7. The paper's pairs on GPUs
#
# Llama-3.1-8B-Instruct against Qwen3-8B, as in arXiv 2602.11729: an estimate of the cost **before you rent a GPU**, the exact commands, a rehearsal of the same commands
# on small models, and checks for the first ten minutes.
#
# **The run with the 8B models was not made**, because no GPU was available for it. Every figure about that run is an *estimate*, from the recipe's settings, the
# models' published shapes and the formulas of `docs/scaling.md`. Next to it is the cost that the paper's authors report. The rehearsal is real.
#
# **Time**: about 3 minutes on 2 idle cores, several times that on busy ones. **Memory**: 3.5 GB. No GPU and no hub: the rehearsal's two models and its text
# come from the package index. **What to expect**: one 80 GB GPU is enough. The run needs about 2 TB of disk, or a tenth of a TB and a second
# pass, and between nine GPU-hours (our estimate) and 150 (the paper's figures, with two nulls at that price). In the rehearsal the checks find a problem that one flag fixes.

# %% tags=["parameters"]
folder = "runs/tutorial-7"  # output folder of the rehearsal
dollars_per_hour = 3.0  # price of one GPU: enter your own
gpu_gb = 80.0  # memory of one GPU
teraflops = 400.0  # achieved throughput of dense bfloat16 matrix products; an H100's peak is 989
terabytes_per_second = 2.3  # achieved memory bandwidth: 70 % of an H100's 3.35
coverage = 0.85  # share of a model's tokens that pair; a guess for Llama and Qwen, which `sae-lens-dfc align` replaces by a count
rehearsal_pairs = 6000  # distinct pairs of the rehearsal
rehearsal_steps = 100  # its training steps, of 512 pairs each
rehearsal_latents = 512  # its dictionary size
rehearsal_texts = 3  # test texts per latent of its screening

# %%
import io
import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import yaml

from sae_lens_dfc import load_crosscoder
from sae_lens_dfc.analysis.evaluation.demo import demo_models
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.metrics.exclusivity.decoders import relative_decoder_norms
from sae_lens_dfc.training.recipes.named import RECIPES
from sae_lens_dfc.training.recipes.settings import recipe_config

# %% [markdown]
# ## The paper's settings
#
# The recipe holds the settings that the paper prints, and asks for the missing ones: the paper gives no index for its "middle layers".

# %%
RECIPE = "llama3.1-8b-vs-qwen3-8b"
print(RECIPES[RECIPE].summary)
for setting, why in RECIPES[RECIPE].required.items():
    print(f"  you choose {setting}: {why}")
hooks = {"model_a": "blocks.16.hook_resid_post", "model_b": "blocks.18.hook_resid_post"}
cfg = recipe_config(RECIPE, **{model: {"hook_name": hook} for model, hook in hooks.items()})
pd.Series(
    {
        "latents": f"{cfg.sae.d_sae:,}",
        "active latents per pair (k)": f"{cfg.sae.k:.0f}",
        "exclusive latents of each model": f"{cfg.sae.n_a_exclusive:,}",
        "distinct pairs": f"{cfg.max_unique_pairs:,}",
        "training pairs, repeats included": f"{cfg.training_tokens:,}",
        "pairs per step": f"{cfg.train_batch_size_tokens:,}",
        "steps": f"{cfg.training_steps:,}",
        "bfloat16 encoder product": cfg.autocast,
        "normalization": cfg.sae.normalization,
        "text": ", ".join(source.dataset_path for source in cfg.all_sources),
    },
    name="recipe",
).to_frame()

# %% [markdown]
# The Llama weights and `lmsys/lmsys-chat-1m` are gated on the hub: accept their terms and log in (`hf auth login`) a day before you rent a GPU.
#
# ## Cost
#
# The models' shapes are those of their published configurations. Activations are computed only up to the hook: the layers above it are never run, and with `drop_unused_layers` they are not kept
# in memory.

# %%
SHAPES = {  # layers, width, MLP width, query heads x head, key and value heads x head, vocabulary; both have untied embeddings
    "Llama-3.1-8B": (32, 4096, 14_336, 4096, 1024, 128_256),
    "Qwen3-8B": (36, 4096, 12_288, 4096, 1024, 151_936),
}


def sizes(name, hook):
    layers, width, mlp, queries, keys, vocabulary = SHAPES[name]
    layer = width * (2 * queries + 2 * keys + 3 * mlp)
    run = int(hook.split(".")[1]) + 1
    return {
        "weights": layers * layer + 2 * vocabulary * width,
        "run": run
        * layer,  # weights that a token is multiplied by up to the hook; attention adds 1 % at 128 tokens
        "kept": run * layer
        + vocabulary * width,  # with drop_unused_layers: embedding and layers up to the hook
    }


a, b = (sizes(name, hook) for name, hook in zip(SHAPES, hooks.values()))
models = pd.DataFrame({name: s for name, s in zip(SHAPES, (a, b))}).T / 1e9
assert models.weights.round(1).tolist() == [8.0, 8.2]  # as in their model cards
models.round(2).rename(columns=lambda c: f"{c}, billion weights")

# %% [markdown]
# **Memory.** A crosscoder in training takes 16 bytes per weight: the weight, its gradient and Adam's two moments, in float32. One batch of all latents comes on top
# (measured for smaller sizes on CPU; `docs/scaling.md`).

# %%
d = SHAPES["Llama-3.1-8B"][1] + SHAPES["Qwen3-8B"][1]
n, k, batch = cfg.sae.d_sae, cfg.sae.k, cfg.train_batch_size_tokens
weights = 2 * d * n + n + d
in_training = 16 * weights / 1e9
batch_of_latents = 2 * batch * n / 1e9
memory = {
    "training, with the models": (
        in_training,
        batch_of_latents,
        2 * (a["kept"] + b["kept"]) / 1e9,
        0,
    ),
    "training on a cache": (in_training, batch_of_latents, 0, 0),
    # It trains a null while the run's crosscoder is loaded, and needs the whole models for token predictions.
    "evaluate --output": (
        in_training,
        batch_of_latents,
        2 * (a["weights"] + b["weights"]) / 1e9,
        4 * weights / 1e9,
    ),
}
memory = pd.DataFrame(
    memory,
    index=[
        "crosscoder, gradients, Adam",
        "a batch of all latents",
        "models",
        "the run's crosscoder",
    ],
).T
axis = memory.plot.barh(stacked=True, figsize=(8, 2.2))
axis.axvline(gpu_gb, color="black", linestyle="--")
axis.set(xlabel="GB (dashed: one GPU)", title=f"{weights / 1e9:.2f} billion weights")
axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
memory.assign(sum=memory.sum(axis=1)).round(1)

# %% [markdown]
# Training fits on one 80 GB GPU with room to spare. The full evaluation almost fills it: there, give each model its own GPU
# (`device: cuda:1`, `cuda:2` in the file), or rent a larger one. During loading the models are whole and in the host's memory first, 32 GB together.
#
# **Time.** Each part of a step is limited by memory traffic or by matrix products. These are the formulas of `docs/scaling.md`, with the throughput of your GPU.


# %%
def step(
    gb_per_ms, flops_per_ms
):  # milliseconds per part of a training step, with the bfloat16 product
    moved = {
        "scores": 16 * batch * n,
        "active latents": 5.1 * 4 * k * batch * d,
        "reading weights": 14 * d * n,
        "gradients, clipping, Adam": 44 * weights,
    }
    product = {"encoder product": 2 * batch * d * n / flops_per_ms}
    return product | {part: x / (gb_per_ms * 1e9) for part, x in moved.items()}


assert round(sum(step(3.0, 400e9).values()), 1) == 71.8  # docs/scaling.md, H100
per_step = step(terabytes_per_second, teraflops * 1e9)
training_hours = cfg.training_steps * sum(per_step.values()) / 3.6e6
tokens_per_pair = 1 / coverage
flops_per_pair = 2 * (a["run"] + b["run"]) * tokens_per_pair
harvest_hours = cfg.max_unique_pairs * flops_per_pair / (teraflops * 1e12) / 3600
passes = cfg.training_tokens / cfg.max_unique_pairs
row_bytes = 2 * d  # bfloat16
print({part: f"{ms:.1f} ms" for part, ms in per_step.items()})
print(
    f"a step takes {sum(per_step.values()):.0f} ms, {cfg.training_steps:,} steps {training_hours:.1f} h"
)
print(
    f"both models over {cfg.max_unique_pairs:,} pairs: {harvest_hours:.1f} h; a row is {row_bytes / 1024:.0f} KiB"
)

# %% [markdown]
# The table compares **three variants** with the paper's own figures. A cache costs disk space and saves the second pass; it also lets you train several crosscoders (seeds, the
# BatchTopK baseline) without computing the activations again. **The nulls are not free**: `evaluate --output` trains a crosscoder like yours on each of two null pairs, for as many steps, on at most
# 100,000 distinct pairs. The estimates omit downloads, reading text, the evaluation itself, the dead latents' loss (up to 110 ms per step if a quarter is dead), and an hour
# for initial mistakes.

# %%
disk_of_runs = (
    4 * weights + 2 * 12 * weights
) / 1e9  # the saved form, and two checkpoints with Adam's moments
disk_of_models = 2 * (a["weights"] + b["weights"]) / 1e9


def way(harvest, training, cache_pairs, disk=disk_of_models + disk_of_runs):
    nulls = 2 * training
    hours = harvest + training + nulls
    return {
        "harvest, GPU-hours": harvest,
        "training, GPU-hours": training,
        "two nulls, GPU-hours": nulls,
        "disk for the cache, TB": cache_pairs * row_bytes / 1e12,
        "disk for models and runs, GB": disk,
        "cost, $": hours * dollars_per_hour,
    }


ways = pd.DataFrame(
    {
        "estimate: cached once": way(harvest_hours, training_hours, cfg.max_unique_pairs),
        "estimate: no cache, two passes": way(passes * harvest_hours, training_hours, 0),
        "estimate: 20 million pairs, 10 times": way(harvest_hours / 5, training_hours, 20e6),
        "the paper's figures, on H100s": way(72.0, 24.0, float("nan"), float("nan")),
    }
).T
ways.round(1)

# %% [markdown]
# The last row is from the paper's appendix A: three H100 for 24 hours for the activations of a pair, and one for 24 hours for each crosscoder. The two nulls at that price are our addition.
# The paper's cost is many times our estimate,
# and it is a **measurement** while ours is not. Trust our estimate only after timing a hundred steps, and budget for the paper's. Possible reasons for the difference: their step is dense (0.86 s), their
# forward passes may not stop at the hook, and no kernel reaches the full throughput that the formulas assume.
#
# Using fewer distinct pairs saves the most; its effect on quality has not been measured on these models.
#
# ## The commands
#
# One file holds your own settings, and the recipe holds the rest. The five commands follow; the rehearsal below runs **the same strings**.

# %%
gpu = {
    "model_a": {"hook_name": hooks["model_a"], "device": "cuda", "drop_unused_layers": True},
    "model_b": {"hook_name": hooks["model_b"], "device": "cuda", "drop_unused_layers": True},
    "device": "cuda",
    "store_batch_size_prompts": 128,
    "cache_path": "/data/llama-qwen",
    "output_path": "runs/llama-qwen",
}
COMMANDS = """
sae-lens-dfc cache --recipe {recipe} --config {config}
sae-lens-dfc train --recipe {recipe} --config {config}
sae-lens-dfc evaluate {run} --output {run}-evaluation{evaluate_flags}
sae-lens-dfc screen {run} --output {run}-screening --evidence {run}-evaluation{screen_flags}
sae-lens-dfc report {run}
"""
print("# gpu.yaml\n" + yaml.dump(gpu, sort_keys=False))
print(
    COMMANDS.format(
        recipe=RECIPE, config="gpu.yaml", run=gpu["output_path"], evaluate_flags="", screen_flags=""
    )
)

# %% [markdown]
# Before you rent a GPU, count how many tokens pair, on any laptop with the two tokenizers and some of your text. The result replaces the guess of `coverage` above:
#
#     sae-lens-dfc align meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen3-8B text.jsonl
#
# If `cache` or `train` is interrupted, continue it with `--resume`. `train --config` with a list under `sae` trains several crosscoders in one pass ([docs/data.md](../docs/data.md)).
#
# ## The rehearsal
#
# The rehearsal runs the same recipe and commands on SmolLM2-135M-Instruct and Gemma-3-270M, which also differ in architecture, width and tokenizer. **Only names and sizes differ**; this file holds all changes
# to the recipe.

# %%
small_a, small_b = demo_models(DemoConfig())
rehearsal = {
    "model_a": {"model_name": small_a.model_name, "hook_name": "blocks.15.hook_resid_post"},
    "model_b": {"model_name": small_b.model_name, "hook_name": "blocks.9.hook_resid_post"},
    "dataset_path": "cpython-docs",  # replaces the recipe's sources
    "max_unique_pairs": rehearsal_pairs,
    "eval_pairs": rehearsal_pairs // 3,
    "cache_path": f"{folder}/cache",
    "output_path": f"{folder}/run",
    "training_tokens": 512 * rehearsal_steps,
    "train_batch_size_tokens": 512,
    "lr": 1e-3,
    "lr_warm_up_steps": rehearsal_steps // 5,
    "dead_feature_window": rehearsal_steps // 4,
    "n_checkpoints": 0,
    "autocast": False,
    "overwrite": True,
    "sae": {
        "d_sae": rehearsal_latents,
        "k": 16,
        "k_initial": 64,
        "k_anneal_steps": rehearsal_steps // 5,
        "topk_threshold_lr": 0.05,  # the default rate of 0.01 would need more steps than this
    },
}
config_file = Path(folder) / "rehearsal.yaml"
config_file.parent.mkdir(parents=True, exist_ok=True)
config_file.write_text(yaml.dump(rehearsal, sort_keys=False))


def run(command, shown=True):
    """Run a command in this process, as a shell would; raise an error if it fails."""
    print(f"$ {command}")
    answer = io.StringIO()
    with redirect_stdout(answer):
        status = main(shlex.split(command)[1:])
    if status != 0:
        raise RuntimeError(f"failed: {command}")
    print(answer.getvalue() if shown else "")


filled = COMMANDS.format(
    recipe=RECIPE,
    config=config_file,
    run=rehearsal["output_path"],
    # Fewer of the most expensive metrics: the rehearsal only tests the pipeline.
    evaluate_flags=" --overwrite --null self --downstream-pairs 0 --behavior-latents 0",
    screen_flags=f" --overwrite --keep 2 --texts {rehearsal_texts} --controls 2",
)
cache, train, evaluate, screen, report = filled.strip().splitlines()
run(cache)

# %%
run(train)

# %%
run(evaluate)

# %%
run(screen)
run(report)

# %% [markdown]
# All five commands ran. The metrics themselves are not informative, because a few thousand pairs are too few to train a crosscoder well. The checks are.
#
# ## The first ten minutes
#
# On the rented machine, first run the five commands on 50,000 pairs of the real models (`--max-unique-pairs 50000 --training-tokens 409600`, with another `cache_path` and
# `output_path`). Then run these checks, in this order. Each line is computed from files that the commands write: the cache's `manifest.json` and the
# evaluation's `metrics.json`.


# %%
def checks(cache_folder, evaluation):
    manifest = json.loads((Path(cache_folder) / "manifest.json").read_text())
    m = json.loads((Path(evaluation) / "metrics.json").read_text())
    counts, norms, k = manifest["counts"], manifest["norms"], rehearsal["sae"]["k"]
    rows = []

    def add(check, value, is_fine, why, null=float("nan")):
        fine = "yes" if is_fine else "LOOK"
        rows.append({"check": check, "value": value, "null": null, "fine": fine, "if not": why})

    def with_null(key):
        return m[key], m[f"null/self/{key}"]

    for model, name in (("a", "A"), ("b", "B")):
        paired = counts["coverage"][f"coverage_{model}"]
        why = "the two tokenizers, or a chat template, split the text differently"
        add(f"tokens of {name} that pair", paired, paired > 0.6, why)
        lost = counts[f"outlier_{model}"] / counts["pairs"]
        why = "massive activations at positions other than the first"
        add(f"pairs left out as outliers by {name}", lost, lost < 0.02, why)
        spread = norms[model]["std"] / norms[model]["mean"]
        add(
            f"spread of {name}'s norms over their mean",
            spread,
            spread < 0.5,
            "a few tokens dominate",
        )
    infinite = counts["not_finite"]
    add(
        "pairs that are not finite",
        infinite,
        infinite == 0,
        "a model overflows in its number format",
    )
    l0, null = with_null("l0")
    why = "the threshold lags behind training"
    add("active latents over k", l0 / k, 0.8 < l0 / k < 1.25, why, null / k)
    lean, null = with_null("relative_decoder_norm/median")
    why = "one model dominates the other: check normalization"
    add("relative decoder norm, shared, median", lean, 0.4 < lean < 0.6, why, null)
    for name, most in (("shared", 0.3), ("a_exclusive", 0.7), ("b_exclusive", 0.7)):
        dead, null = with_null(f"dead_fraction/{name}")
        why = "too many latents for the text, too few steps, or too high a learning rate"
        add(f"dead share, {name}", dead, dead < most, why, null)
    for model, name in (("a", "A"), ("b", "B")):
        explained, null = with_null(f"explained_variance/{model}")
        why = "the other model uses most latents"
        add(f"explained variance, {name}", explained, explained > 0.7 * null, why, null)
    add(
        "largest forbidden weight",
        m["max_forbidden_weight"],
        m["max_forbidden_weight"] == 0,
        "a bug: please report it",
    )
    return pd.DataFrame(rows).set_index("check").round(3)


found = checks(rehearsal["cache_path"], f"{rehearsal['output_path']}-evaluation")
pd.set_option("display.max_colwidth", None)
found.replace({"null": {float("nan"): "–"}})

# %% [markdown]
# The limits are rules of thumb from this package's own runs, all of them on small models. They show where to look, not what is true. The null is the same
# pipeline on model A twice, where the variance is equally easy to explain for both sides.
#
# Some lines say LOOK here, for two reasons.
#
# **One model dominates the other.** The recipe's normalization is the paper's, `median_norm`. It does not center the activations, so for a model with a large mean most of the norm is
# the mean, and the part that varies has little weight. Shared latents then lean to the other model. We do not know whether Llama and Qwen have this problem; the
# ten-minute check will show it. The cell below tries the remedy, a flag.
#
# **The exclusive partitions are almost dead**, in the null as well. A hundred steps are too few to conclude anything else: in the demo's run of 300 steps none of A's and a tenth of
# B's are dead. If they stay dead in a long run, try `--sae.decoder-norm l2`, which is our default but not the paper's. It is fairer to latents that write to one model only
# ([benchmarks](../benchmarks/README.md)).

# %%
run(f"{train} --sae.normalization variance --output-path {folder}/run-variance")
run(evaluate.replace(rehearsal["output_path"], f"{folder}/run-variance"), shown=False)
mended = checks(rehearsal["cache_path"], f"{folder}/run-variance-evaluation")
columns = ["value", "null", "fine"]
pd.concat({"median_norm": found[columns], "variance": mended[columns]}, axis=1).iloc[7:]

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharex=True, sharey=True)
for axis, (name, where) in zip(axes, (("median_norm", "run"), ("variance", "run-variance"))):
    crosscoder = load_crosscoder(f"{folder}/{where}")
    shared = crosscoder.partition.slices["shared"]
    axis.hist(relative_decoder_norms(crosscoder)[shared].tolist(), bins=40, range=(0, 1))
    axis.axvline(0.5, color="black", linewidth=0.8)
    axis.set(title=name, xlabel="relative decoder norm, shared latents")
axes[0].set_ylabel("latents")
figure.tight_layout()

# %% [markdown]
# Both models' shared latents are now near the middle. The remedy has a price: less of A's variance is explained, which dominated before, and more of B's.
#
# ## Before you start the run
#
# - [ ] Terms of the gated model and data set accepted, `hf auth login` done, 33 GB of weights downloaded **before** the paid GPU time begins.
# - [ ] `sae-lens-dfc align` run on your text, and `coverage` above set to its result.
# - [ ] Disk space: both disk columns of the table, plus a tenth.
# - [ ] The five commands run on 50,000 pairs of the real models, and the checks above passed.
# - [ ] A hundred steps timed, and the hours estimated again from them.
# - [ ] The nulls in the budget, and a second seed. **A DFC without its null shows nothing** ([tutorial 1](1_toy_pair.ipynb)).
# - [ ] `--n-checkpoints` at its default (10): an interrupted run continues with `--resume`.
#
# If you make this run, please send us the time per step and the results of the checks. They would be the first measurement to appear here.
