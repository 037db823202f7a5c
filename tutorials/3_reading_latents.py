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
# # 3. Reading latents, and the evidence that one is exclusive
#
# At the end you have read latents of the crosscoder of [tutorial 2](2_two_models.ipynb) in both models' tokens, measured of each latent in an exclusive
# partition whether the other model has it too, held that against a pair on which nothing is exclusive, and written a page
# on which all of it can be searched.
#
# - **Time**: about 2 minutes on 2 CPU cores, and one and a half more where the run of tutorial 2 is not in its folder and is trained first. **Memory**: 3 GB.
# - **Expect**: readable latents in every partition, and **none that is called exclusive**. Gemma tells when SmolLM2's exclusive latents fire, with an AUC
#   around 0.95. That is a negative result of a short run on little text, and the point of the page is how one sees it.

# %% tags=["parameters"]
folder = "runs/tutorial-3"  # everything that is written
run = "runs/tutorial-2/run"  # the crosscoder to read; trained below if it is not there
max_unique_pairs = 48_000  # as in tutorial 2, all of these, if it has to be trained
training_tokens = 204_800
eval_pairs = 8_000
d_sae = 2048
k = 32
n_shown = 2  # latents of each partition that are shown with their text

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display

from sae_lens_dfc import CrosscoderTrainingRunner
from sae_lens_dfc.analysis.evaluation.baselines import prefixed
from sae_lens_dfc.analysis.evaluation.demo import demo_models, demo_run_config
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.evaluation.measure import train_crosscoder
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.analysis.latents.cards import latent_cards, strongest_latents
from sae_lens_dfc.analysis.latents.max_activating import collect_max_activating
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.build import report_data, report_settings
from sae_lens_dfc.analysis.report.notebook import latent_html
from sae_lens_dfc.analysis.report.page import render_report
from sae_lens_dfc.analysis.report.results import Measured
from sae_lens_dfc.analysis.saved_run.held_out import opened_run
from sae_lens_dfc.core.output_folder import is_made
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluate import evaluate
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import relative_decoder_norms
from sae_lens_dfc.metrics.exclusivity.evidence import ranking, verdict

pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.3f}".format

# %% [markdown]
# ## A run
#
# If you come from tutorial 2 its run is there. Otherwise this one call trains it, in this tutorial's folder.

# %%
if not is_made(run):
    run = f"{folder}/run"
    demo = DemoConfig(
        d_sae=d_sae,
        k=k,
        max_unique_pairs=max_unique_pairs,
        training_tokens=training_tokens,
        eval_pairs=eval_pairs,
    )
    cfg = demo_run_config(demo, *demo_models(demo))
    CrosscoderTrainingRunner(
        replace(cfg, keep_in_memory=True, output_path=run, overwrite=True)
    ).run()

# %% [markdown]
# Opened with its models, whole: what a latent promotes is read off their unembeddings. The models are checked against those of the training.

# %%
crosscoder, cfg, pair = opened_run(run, HeldOutOptions(), drop_unused_layers=False)
data = PairData.collect(PairedText(cfg, pair), "The two models")
print(f"A is {pair.a.name}, B is {pair.b.name}; {crosscoder.partition.sizes}")
print(f"{sum(len(rows.acts) for rows in data.held_out):,} held-out pairs of positions")

# %% [markdown]
# ## Where latents fire
#
# One pass over held-out text keeps, of every latent at once, its firing rate, its strongest firings (one from a context) and a uniform sample of all its firings. Memory does not grow with the text.

# %%
gathered = collect_max_activating(crosscoder, data.held_out)
firing = gathered.firing
alive = firing.counts > 0
pd.DataFrame(
    {
        name: {
            "latents": f"{len(alive[where])}",
            "never fire": f"{int((~alive[where]).sum())}",
            "median firing rate, of those that fire": f"{firing.rates[where][alive[where]].median():.2%}",
        }
        for name, where in crosscoder.partition.slices.items()
    }
).T

# %% [markdown]
# ## Reading them
#
# A `LatentCard` has what there is to know of a latent, with the text around its firings. Below are the strongest of each partition, by activation in sum. Each context is
# written twice, as A's tokens and as B's; a thin line ends a segment, at which both models have read the same text, and the shade there is the latent's
# activation. The decoder norm is `|d_a| / (|d_a| + |d_b|)`: 1 is A's alone, 0 is B's.


# %%
def cards(latents, evidence=None, **places):
    where = {latent: gathered.places(latent, **places) for latent in latents}
    shown = {place.context for of_latent in where.values() for place in of_latent}
    return latent_cards(crosscoder, gathered, where, data.held_out_of(shown), pair, evidence)


for card in cards(strongest_latents(firing, n_shown)):
    display(HTML(latent_html(card)))

# %% [markdown]
# The strongest contexts of a latent show it at its best. Before believing a description, look at its weak firings too: here the first shared latent of above, one random firing
# from each quarter of its activations, weakest first.

# %%
[first_shared] = strongest_latents(firing, 1)[-1:]
[card] = cards([first_shared], n_strongest=0)
display(HTML(latent_html(card, n_contexts=4)))

# %% [markdown]
# From a shell it is `sae-lens-dfc latents runs/tutorial-2/run --partition a_exclusive --top 5`, one latent a line, or `--json`.
#
# ## What the decoder norms say, and what they do not
#
# In a BatchTopK crosscoder one looks for latents whose decoder has all but left one model. In a DFC the exclusive latents are at 0 and 1 **by construction**, so
# their norms are no evidence of anything. To see what is, a null is needed: the same crosscoder, trained on model A twice at the same places. Nothing is exclusive there.

# %%
case = PairTask(cfg, pair, data)
null = null_case("self", case)
null_crosscoder = train_crosscoder(null)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, one, title in zip(
    axes, (crosscoder, null_crosscoder), ("SmolLM2 and Gemma", "null: SmolLM2 twice")
):
    norms = relative_decoder_norms(one)
    for name, where in one.partition.slices.items():
        ax.hist(norms[where].numpy(), bins=np.linspace(0, 1, 41), label=name)
    ax.set(title=title, xlabel="relative decoder norm", yscale="log")
axes[0].set_ylabel("latents")
axes[0].legend()
plt.show()

# %% [markdown]
# Shared latents of the real pair lie a little to A's side and spread more than in the null, and none comes near 0 or 1.
#
# ## Evidence from activations
#
# Two questions are asked of each candidate, both through an affine map between the models that was fitted to the training text:
#
# - **Latent scaling**: is its direction, moved to the other model, in what the crosscoder fails to rebuild there (`nu_error`), or in what it does rebuild there, by
#   other latents (`nu_reconstruction`)? Near 0 the other model has it not; near 1 it has.
# - **Transfer**: can the other model's activations tell when it fires? AUC 1/2 is not at all, 1 is perfectly.
#
# The same is measured of the null's latents, and of shared latents, which both models have: a map that is not exact loses something of everything, so *shared latents say how a latent looks that is
# not exclusive*.

# %%
found = evaluate(crosscoder, [rows.acts for rows in data.held_out], data.affine_maps(pair.d_a))
null_found = evaluate(
    null_crosscoder, [rows.acts for rows in null.data.held_out], null.data.affine_maps(pair.d_a)
)
evidence, null_evidence = found.evidence, null_found.evidence

# %%
measures = {
    "nu_error": "latent scaling, error",
    "nu_reconstruction": "latent scaling, reconstruction",
    "auc": "AUC of transfer",
}
groups = {
    "A-exclusive": (evidence, evidence.groups["a_exclusive"], "C0", "-"),
    "B-exclusive": (evidence, evidence.groups["b_exclusive"], "C1", "-"),
    "shared": (evidence, evidence.groups["shared"], "C2", "-"),
    "null: exclusive": (
        null_evidence,
        null_evidence.groups["a_exclusive"] | null_evidence.groups["b_exclusive"],
        "0.5",
        "--",
    ),
}
fig, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
for ax, (name, title) in zip(axes, measures.items()):
    for group, (of, members, color, style) in groups.items():
        values = getattr(of, name)[members].sort().values
        ax.plot(
            values,
            np.linspace(0, 1, len(values)),
            color=color,
            linestyle=style,
            label=f"{group} ({len(values)})",
        )
    ax.set_xlabel(title)
axes[0].set(ylabel="share of latents below", xlim=(-0.2, 1.2))
axes[1].set_xlim(-1, 2)
axes[2].set_xlim(0.5, 1.01)
axes[2].axvline(0.5, color="k", lw=0.5)
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# A latent that is one model's alone would be at 0 in the first two panels and at 1/2 in the third. By latent scaling the real pair's candidates lie left of the shared latents and of most of the null's (dashed): their
# direction is less in the other model. But in the third panel everything crowds at the right: **Gemma tells when SmolLM2's exclusive latents fire**, hardly worse than it tells shared ones. And note the dashed line of the first
# panel: one in five of the null's latents, every one of them false, looks absent by that measure alone.
#
# As numbers, medians with the 5th and 95th percentile over latents:


# %%
def over(values) -> str:
    known = values[~values.isnan()]
    if len(known) == 0:
        return "none fires often enough"
    low, middle, high = (
        known.double().quantile(known.new_tensor([0.05, 0.5, 0.95]).double()).tolist()
    )
    return f"{middle:.3f} [{low:.2f}, {high:.2f}]"


pd.DataFrame(
    {
        group: {title: over(getattr(of, name)[members]) for name, title in measures.items()}
        for group, (of, members, *_) in groups.items()
    }
)

# %% [markdown]
# ## What it takes to be called exclusive
#
# A candidate that fired at least 20 times is called when **both** hold, at a false discovery rate of 5 % over all candidates:
#
# 1. both latent scalings are near 0: within 0.2 and 0.5 times the median of the shared latents (or of 1), beyond their standard error;
# 2. the other model tells its firing worse than that of nearly all shared latents.
#
# A rare latent is not judged. Both are asked, since each is fooled alone: a direction that the map moves beside where it belongs looks absent, and a latent of rare words is hard to tell.

# %%
counts = {
    "judged": "fire often enough",
    "scaling": "pass latent scaling alone",
    "transfer": "pass transfer alone",
    "called": "called exclusive",
}
pd.DataFrame(
    {
        f"{column}, {group}": {
            title: int(of.metrics[f"exclusive/{key}/{group}"]) for key, title in counts.items()
        }
        for column, of in (("this run", found), ("null", null_found))
        for group in ("a_exclusive", "b_exclusive")
    }
)

# %% [markdown]
# Nothing stands: some of SmolLM2's pass transfer, as one in twenty shared latents does by definition, and **none passes latent scaling**, whose standard errors over so little text are wide. Here are the candidates with the most evidence, with what is said of each and its
# text. Judge for yourself what Gemma should not know there.

# %%
most = ranking(evidence)[:n_shown].tolist()
for latent, card in zip(most, cards(most, evidence)):
    print(f"{latent}: {verdict(evidence, latent)}")
    display(HTML(latent_html(card)))

# %% [markdown]
# What would change the picture: more text and a longer training, so that latents fire often enough to be judged; several seeds, since a latent that is in one seed only is not worth
# a claim (`sae-lens-dfc evaluate` takes several runs); or a test during training, after which false candidates become shared (`--recipe dfc-reassigned`).
# And what no figure on this page can say: that a model lacks a *concept*. The tests are linear. The next step is causal, in [tutorial 4](4_steering_one_model.ipynb) and [5](5_base_and_fine_tuned.ipynb).
#
# ## The page
#
# Everything above, for every latent, on one page that works offline: verdicts first, each measure beside its null, and a table of latents to sort and search.

# %%
metrics = found.metrics | data.metrics | prefixed("null/self/", null_found.metrics)
page = report_data(
    Measured(crosscoder, found._replace(metrics=metrics)), data, pair, report_settings(cfg)
)
path = Path(folder) / "report.html"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(render_report(page), encoding="utf-8")
print(
    f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(page.cards)} latents, {sum(bool(c.contexts) for c in page.cards)} with their text"
)

# %% [markdown]
# From a shell, with the shuffled null, next-token losses and steering as well (6 minutes here):
#
# ```
# sae-lens-dfc evaluate runs/tutorial-2/run --output runs/tutorial-2/evaluation
# ```
#
# **Next**: [4, steering one model and not the other](4_steering_one_model.ipynb).
