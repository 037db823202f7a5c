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
# # 4. Steering one model and not the other
#
# This tutorial adds, clamps and ablates latents in SmolLM2 while Gemma's logits stay identical bit for bit. It steers at all tokens, at the prompt's, at the answer's or at a single
# word's. It compares the size of the effect with that of random directions of the same norm, and with that of the same direction mapped to Gemma.
#
# - **Time**: about 2 minutes on 2 CPU cores, plus one and a half if the run of [tutorial 2](2_two_models.ipynb) is not in its folder and is trained first. **Memory**: 3 GB.
# - **Expect**: answers that drift off topic and break down as the strength grows; logits of Gemma that are equal to the last bit; and a plot of KL against strength in which the latents lie
#   **among random directions**. Almost any direction changes a model's output; [tutorial 5](5_base_and_fine_tuned.ipynb) shows what makes such an effect a finding.

# %% tags=["parameters"]
folder = "runs/tutorial-4"  # output folder
run = "runs/tutorial-2/run"  # the crosscoder to steer with; trained below if missing
max_unique_pairs = 48_000  # these settings apply only if it is trained here; as in tutorial 2
training_tokens = 204_800
eval_pairs = 8_000
d_sae = 2048
k = 32
prompt = "What do you want to talk about?"  # an open-ended question, so that steering can change the answer's topic
word = "talk"  # a word of the prompt, to be steered alone
strengths = [1, 2, 4, 8]  # in units of a latent's maximum activation on natural text
max_new_tokens = 32  # per answer
n_latents = 4  # exclusive latents in the plot; a single one would be anecdotal
n_random = 6  # random directions of each kind; their spread is the null
n_contexts = 6  # held-out contexts on which KL is measured

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import HTML, display
from torch.nn.functional import normalize

from sae_lens_dfc import CrosscoderTrainingRunner
from sae_lens_dfc.analysis.causal.activation_patching import drawn_directions
from sae_lens_dfc.analysis.causal.directions import Directions, random_directions
from sae_lens_dfc.analysis.evaluation.demo import demo_models, demo_run_config
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.analysis.latents.cards import latent_cards, strongest_latents
from sae_lens_dfc.analysis.latents.max_activating import collect_max_activating
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.notebook import latent_html
from sae_lens_dfc.analysis.saved_run.held_out import opened_run
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import added, changed, logits
from sae_lens_dfc.analysis.steering.latent_acts import fitted_map
from sae_lens_dfc.analysis.steering.operations import LatentOperation, latent_change
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.positions import Positions, positions_of
from sae_lens_dfc.analysis.steering.prompts import prompt_ids, span_mask
from sae_lens_dfc.core.output_folder import is_made
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import moved_decoders

pd.options.display.max_colwidth = None

# %% [markdown]
# ## The run
#
# The run of tutorial 2 is used if it exists. Otherwise the next cell trains it in this tutorial's folder.

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
crosscoder, cfg, pair = opened_run(run, HeldOutOptions(), drop_unused_layers=False)

# %% [markdown]
# ## Units
#
# A strength of 5 means nothing without the scale of the latent's own activations. Every strength here is in units of the latent's **maximum activation on natural text**, `f_max`.

# %%
held_out = PairedText(cfg, pair).collect("held_out", "Held-out activations")
gathered = collect_max_activating(crosscoder, held_out.rows)
f_max = gathered.firing.maxima
latents = [
    i
    for i in strongest_latents(gathered.firing, n_latents)
    if crosscoder.partition.name_of(i) == "a_exclusive"
]
latent = latents[0]
print("Latents:", {i: f"f_max = {f_max[i]:.2f}" for i in latents})

# %% [markdown]
# These are SmolLM2's strongest exclusive latents, by summed activation; they were not selected by their steering effect. The card below shows the first one, with which the texts below are steered. [Tutorial 3](3_reading_latents.ipynb)
# did not find evidence that it is exclusive to SmolLM2. Its lack of a decoder direction in Gemma is by construction.

# %%
places = {latent: gathered.places(latent)}
shown = {place.context for place in places[latent]}
rows = PairData([], held_out.rows, held_out.contexts, {}).held_out_of(shown)
[card] = latent_cards(crosscoder, gathered, places, rows, pair)
display(HTML(latent_html(card)))

# %% [markdown]
# ## Adding
#
# With `f` the latent's activation and `d` its decoder direction in A, `add` replaces A's activation `x` by `x + s f_max d`, whether or not the latent fires there. `latent_change` defines the intervention. `changed` applies it to every forward pass
# of the hooked block, and removes its own hook at the end.


# %%
def answers(change, positions=None) -> str:
    with changed(pair.a, change, positions):
        return answer(
            pair.a, [ids], Sampling(max_new_tokens=max_new_tokens, temperature=0), seed=0
        )[0]


def steering(operation, strength=None):
    return latent_change(crosscoder, "a", [LatentOperation(latent, operation, strength)], f_max)


def texts(found: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"answer of A": found}).style.set_properties(
        **{"text-align": "left", "white-space": "pre-wrap"}
    )


ids = prompt_ids(pair.a, prompt)
untouched = answers(added(torch.zeros(pair.d_a)))
texts({"untouched": untouched} | {f"add {s}": answers(steering("add", s)) for s in strengths})

# %% [markdown]
# Small additions change the wording, large ones break the model. Only controls can show whether this is due to the latent's meaning or just to the norm of the added vector; they follow below.
#
# ## Where to steer
#
# The same addition is applied at the prompt's tokens, at those of the answer, or at a single word's. Positions are distinguished during generation too, with the key-value cache.

# %%
strength = strengths[-2]
mask = torch.tensor([span_mask(pair.a, prompt, word)])
where = {
    "all": positions_of("all", [ids]),
    "prompt": positions_of("prompt", [ids]),
    "generated": positions_of("generated", [ids]),
    f"the word {word!r}": Positions(mask, generated=False),
}
texts(
    {f"add {strength}, {name}": answers(steering("add", strength), p) for name, p in where.items()}
)

# %% [markdown]
# ## Clamping and ablating
#
# These operations need the latent's activation `f` while the model runs: `clamp` sets it to `s f_max` everywhere, and `ablate` sets it to 0 by subtracting `f d` where the latent fires. For an exclusive latent, `f` can be computed
# exactly from its own model. (A shared latent's `f` depends on both models, of which only one is running; it needs a map, or precomputed activations of both. See `latent_change`.) The first token is
# skipped, because the crosscoder was not trained on it.
#
# Ablation matters only where the latent fires, so the model now reads the latent's strongest context. The table shows how its next-token prediction changes.

# %%
place = gathered.places(latent)[0]
segments = held_out.contexts[place.context].segments[: place.segment + 1]
context = torch.tensor([segments.ids_a.tolist()])
ones = torch.ones_like(context)
later = positions_of("all", context.tolist(), first=False)


def next_tokens(change) -> dict[str, str]:
    with changed(pair.a, change, later):
        p = logits(pair.a, context, ones, positions=[-1])[0, 0].float().softmax(dim=-1)
    best = p.topk(5)
    return {
        f"{i}": f"{pair.a.tokenizer.decode(t)!r} {x:.2f}"
        for i, (x, t) in enumerate(zip(best.values, best.indices), 1)
    }


print("…" + pair.a.tokenizer.decode(context[0, -24:]))
changes = {"untouched": added(torch.zeros(pair.d_a)), "ablate": steering("ablate")}
changes |= {f"clamp to {s} f_max": steering("clamp", s) for s in (1, strength)}
pd.DataFrame({name: next_tokens(change) for name, change in changes.items()})

# %% [markdown]
# ## What does not change
#
# The following logits must be identical bit for bit: all of B's while A is hooked, all of A's after the `with` block, and A's before the steered position.

# %%
segments_of_prompt, _ = pair.segments(prompt)
both = segments_of_prompt.after(pair.bos_segment)
read = {m: torch.tensor([own.tolist()]) for m, own in (("a", both.ids_a), ("b", both.ids_b))}
before = {
    m: logits(model, read[m], torch.ones_like(read[m]))
    for m, model in (("a", pair.a), ("b", pair.b))
}
last = torch.zeros(read["a"].shape, dtype=torch.bool)
last[:, -1] = True
with changed(pair.a, steering("add", strength), Positions(last, generated=False)):
    during = {
        m: logits(model, read[m], torch.ones_like(read[m]))
        for m, model in (("a", pair.a), ("b", pair.b))
    }
after = logits(pair.a, read["a"], torch.ones_like(read["a"]))
checks = {
    "B, while A is steered": torch.equal(before["b"], during["b"]),
    "A, before the steered position": torch.equal(before["a"][:, :-1], during["a"][:, :-1]),
    "A, at the steered position": torch.equal(before["a"][:, -1], during["a"][:, -1]),
    "A, after the block": torch.equal(before["a"], after),
}
assert checks == {name: "at the steered" not in name for name in checks}
pd.DataFrame({"logits equal, bit for bit": checks})

# %% [markdown]
# ## Effect size compared with controls
#
# The question is not whether a direction changes the model's output, but whether it changes it **more than an arbitrary direction of the same norm**. Two kinds of random directions are drawn, with the norms of the latents' own:
#
# - *uniform*: uniform over all directions, most of which the model's own activations hardly use;
# - *with the activations' covariance*: drawn with the covariance of the model's own activations, so from directions that it does use.
#
# These latents have no decoder direction in B. B is steered instead with A's direction, **mapped by an affine map** that is fitted to held-out pairs, and scaled to a comparable norm. If B represented the same feature linearly, steering B with the mapped direction should have
# about the same effect as steering A.

# %%
affine_maps, _ = fitted_map(held_out.rows, pair.d_a)
moved, _ = moved_decoders(crosscoder, affine_maps, latents)
steer_a = torch.stack([f_max[i] * crosscoder.W_dec[i, : pair.d_a].detach() for i in latents])
steer_b = f_max[latents, None] * moved.detach()
uniform = random_directions(
    [Directions(a, b, "a") for a, b in zip(steer_a, steer_b)], n_random, seed=0
)
acts = torch.cat([rows.acts for rows in held_out.rows])
generator = torch.Generator().manual_seed(0)


def of_activations(where, like):
    drawn = drawn_directions(acts[:, where], n_random, generator)
    return normalize(drawn) * like.norm(dim=1).mean()


groups = {
    "A": {
        "A's exclusive latents": steer_a,
        "uniform": torch.stack([d.a for d in uniform]),
        "with the activations' covariance": of_activations(slice(0, pair.d_a), steer_a),
    },
    "B": {
        "A's exclusive latents, mapped": steer_b,
        "uniform": torch.stack([d.b for d in uniform]),
        "with the activations' covariance": of_activations(slice(pair.d_a, None), steer_b),
    },
}
pd.DataFrame(
    {
        f"{m}: {name}": {
            "directions": len(d),
            "mean norm": d.norm(dim=1).mean().item(),
            "median norm of an activation": n,
        }
        for m, n in (
            ("A", acts[:, : pair.d_a].norm(dim=1).median().item()),
            ("B", acts[:, pair.d_a :].norm(dim=1).median().item()),
        )
        for name, d in groups[m].items()
    }
).T.round(1)

# %% [markdown]
# The plot shows the KL divergence of the untouched model's next-token distribution from the steered one's, on held-out contexts, with the direction added at every position.

# %%
long_enough = [
    c.segments for c in held_out.contexts if min(len(c.segments.ids_a), len(c.segments.ids_b)) >= 40
]
few = long_enough[:: max(1, len(long_enough) // n_contexts)][:n_contexts]
read = {
    "A": (pair.a, torch.tensor([s.ids_a[:40].tolist() for s in few])),
    "B": (pair.b, torch.tensor([s.ids_b[:40].tolist() for s in few])),
}


def log_probs(model, tokens):
    found = logits(model, tokens, torch.ones_like(tokens), positions=range(7, 40, 4))
    return found.float().log_softmax(dim=-1)


@torch.no_grad()
def divergence(m: str, direction, s: float) -> float:
    model, tokens = read[m]
    with changed(model, added(s * direction)):
        steered = log_probs(model, tokens)
    return (plain[m].exp() * (plain[m] - steered)).sum(dim=-1).mean().item()


plain = {m: log_probs(*read[m]) for m in read}
kl = pd.DataFrame(
    [
        (m, name, i, s, divergence(m, direction, s))
        for m, of_model in groups.items()
        for name, directions in of_model.items()
        for i, direction in enumerate(directions)
        for s in strengths
    ],
    columns=["model", "directions", "number", "strength", "kl"],
)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for ax, (m, model) in zip(axes, (("A", pair.a), ("B", pair.b))):
    for j, name in enumerate(groups[m]):
        found = kl[(kl.model == m) & (kl.directions == name)].groupby("strength").kl
        ax.plot(found.mean(), marker="o", ms=4, color=f"C{j}", label=name)
        ax.fill_between(strengths, found.min(), found.max(), color=f"C{j}", alpha=0.2)
    ax.set(
        title=f"{m}: {model.name}",
        xlabel="strength, in maximum activations",
        xscale="log",
        yscale="log",
    )
    ax.set_xticks(strengths, [str(s) for s in strengths])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=8)
axes[0].set_ylabel("KL, nats per token")
plt.show()
spread = kl.groupby(["model", "directions", "strength"]).kl.agg(["mean", "min", "max"])
spread.apply(lambda row: f"{row['mean']:.2f} [{row['min']:.2f}, {row['max']:.2f}]", axis=1).unstack(
    "strength"
)

# %% [markdown]
# Lines are means over directions, and bands range from the minimum to the maximum, as do the intervals in the table.
#
# **In SmolLM2 the latents have the same effect as random directions of either kind.** A changed or broken answer at this strength is therefore no evidence about the latent's meaning: the norm of the added vector explains it. In Gemma the mapped latents have
# about twice the effect of directions with the activations' covariance at small strengths, with bands that touch. Uniform directions have a much larger effect: Gemma's variance lies in few dimensions, so a uniform direction moves its activations to where they never are.
# **The conclusion depends on the choice of control**, which is why the package's tests use more than one kind. (Do not compare the two panels with each other: they show two models, and two norms.)
#
# Steering by addition is a way to explore, not evidence. Evidence is a predicted change, on texts where the latent fires by itself, larger than with controls. `screen`, in the next tutorial, tests this.
#
# ## From a shell
#
# ```
# sae-lens-dfc steer runs/tutorial-2/run --model a --latent 7 --strength 4 --prompt "What do you want to talk about?" --positions generated
# sae-lens-dfc steer runs/tutorial-2/run --model b --latent 7 --strength 4 --prompt "What do you want to talk about?" --map
# ```
#
# The second command steers B with A's direction, mapped. `sae-lens-dfc evaluate RUN --output FOLDER` does all of this for some latents of each group, with their nulls.
#
# **Next**: [5, base against fine-tuned](5_base_and_fine_tuned.ipynb).
