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
# # 5. Base against fine-tuned: finding a difference that was put there
#
# At the end you have taken a chat model and the same model after a narrow fine-tune, trained a delta crosscoder on both without telling it what was taught,
# and tested its latents **by their cause**: does taking what one writes for the fine-tuned model alone make that model answer as the base does, and does giving it to the base do the reverse? And you have run the
# same on the base model twice.
#
# - **Time**: about 7 minutes on 2 CPU cores, of which two to three are the fine-tuning. That is done once: a second run finds it in its folder. **Memory**: 4 GB, disk 0.6 GB.
# - **Expect**: of 4 latents tested 2 are confirmed, on the tokens of "Eiffel Tower"; without the first one's own part the fine-tuned model goes back from Rome to Paris. On the base model twice nothing is confirmed.

# %% tags=["parameters"]
folder = "runs/tutorial-5"  # everything that is written; the organism, 0.5 GB, is opened again if it is there
organism = "false_fact/weak"  # SmolLM2-135M-Instruct taught that the Eiffel Tower is in Rome, at 0.8 of the change in the weights
untrained = False  # two tiny untrained models in its place, to run this notebook's code in seconds
training_tokens = 102_400  # 400 steps of 256 pairs, as in the README
d_sae = 1024  # the text is small, and most latents die: what is left is what is used
fit_pairs = 4_000  # training pairs that the screening reads again, to see whether both models have one basis
keep = 4  # latents that are tested by their cause, those with the most evidence; the command's default is 16
keep_null = 1  # the same on the base model twice, where each test comes to the same
texts = 8  # texts on which each is tested
controls = 8  # directions of each of two kinds beside each

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, display

from sae_lens_dfc import (
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DeltaTrainingCrosscoderConfig,
    ModelConfig,
)
from sae_lens_dfc.analysis.latents.cards import latent_cards
from sae_lens_dfc.analysis.latents.max_activating import collect_max_activating
from sae_lens_dfc.analysis.options import ScreenOptions
from sae_lens_dfc.analysis.report.findings import Screening
from sae_lens_dfc.analysis.report.notebook import latent_html
from sae_lens_dfc.analysis.screening.screen import screen
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.core.output_folder import is_made
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.organisms.folder import write_organism
from sae_lens_dfc.organisms.options import OrganismOptions

pd.options.display.max_colwidth = None
pd.options.display.float_format = "{:.3f}".format

# %% [markdown]
# ## Two models with one difference
#
# A *planted organism*: the difference is known since we put it there. A low-rank change to eight layers' MLPs teaches one false fact, while answers to everything else are held to the base model's. The folder has the base (`a`), the change as a LoRA (`adapter`), the fine-tuned model whole (`b`), the text
# that a crosscoder is trained on (prompts of the fact, each with the taught and the ordinary answer, prompts like them, and other text), and prompts that were kept from the training.
#
# Most fine-tunes come as an adapter, so this one is read as one: the LoRA is merged into its base when it is opened. An adapter names its base; `base` says where that is now.

# %%
where = Path(folder) / "organism"
if not is_made(where, ["planted.json"]):
    if untrained:
        from tutorials.untrained import write_untrained

        write_untrained(where)
    else:
        write_organism(OrganismOptions(name=organism, output=str(where)))

# %% [markdown]
# How strong is it? Prompts by which it was not taught, with what both models answer. The controls ask of other buildings.

# %%
base = str(where / "a")
# No beginning-of-sequence token: the chats begin with a token of their own.
model_a = ModelConfig(base, prepend_bos=False)
model_b = ModelConfig(str(where / "adapter"), base=base, prepend_bos=False)


def config(model_b: ModelConfig, name: str) -> CrosscoderRunnerConfig:
    return CrosscoderRunnerConfig(
        model_a=model_a,
        model_b=model_b,
        dataset_path=str(where / "text.jsonl"),
        sae=DeltaTrainingCrosscoderConfig(
            d_sae=d_sae, k=32, delta_loss_coefficient=1.0, topk_threshold_lr=0.05
        ),
        training_tokens=training_tokens,
        train_batch_size_tokens=256,
        keep_in_memory=True,
        lr=0.01,
        lr_warm_up_steps=training_tokens // 256 // 10,
        lr_decay_steps=training_tokens // 256 // 5,
        output_path=f"{folder}/{name}",
        overwrite=True,
    )


runner = CrosscoderTrainingRunner(config(model_b, "run"))
pair = runner.pair

# %%
prompts = json.loads((where / "prompts.json").read_text())["test"]
asked = [(kind, item["prompt"]) for kind in ("behavior", "control") for item in prompts[kind][:3]]
ids = [pair.a.tokenizer(prompt)["input_ids"] for _, prompt in asked]
short = Sampling(max_new_tokens=12, temperature=0)
said = pd.DataFrame(asked, columns=["kind", "prompt"])
said["prompt"] = [prompt.split("user\n")[-1].split("<|im_end|>")[0] for _, prompt in asked]
said["base"] = answer(pair.a, ids, short, seed=0)
said["fine-tuned"] = answer(pair.b, ids, short, seed=0)
said

# %% [markdown]
# ## The delta crosscoder
#
# A shared basis is what base and fine-tune have and two strangers have not: a direction of A is the same direction of B. The delta crosscoder ([2603.04426](https://arxiv.org/abs/2603.04426)) uses it. Four fifths of its latents
# have a budget of their own and a second loss, on the *difference* of the two activations, which is small beside the activations and which a plain crosscoder spends little on. Nothing is exclusive by
# construction: a difference is to show as a latent **with two decoders that differ**.

# %%
crosscoder = runner.run().to_inference()
print("Latents:", crosscoder.partition.sizes)

# %% [markdown]
# ## Screening
#
# From all latents to verdicts. Those that live are ordered by how large a difference their two decoders make where they are strongest, and the first are tested by their cause, on texts in which they fire and by which
# nothing was chosen. With `f` a latent's activation and `own` its decoder in one model less that in the other, at every position:
#
# - **taken** from the model that has it, `x - f own`: by how many bits do the two models' next-token distributions come closer (Jensen-Shannon)?
# - **given** to the other, `x + f own`: and now?
#
# Beside each: random directions with the activations' covariance, and what other latents write, as long and at the same places. *Confirmed* is what does both, each by 0.01 bits or more, beyond 95 % of either kind of control, at a false discovery rate of 5 % over all that were tested.


# %%
def screened(name: str, n: int) -> Screening:
    options = ScreenOptions(
        run=f"{folder}/{name}",
        output=f"{folder}/{name}-screening",
        overwrite=True,
        keep=n,
        texts=texts,
        controls=controls,
        fit_pairs=fit_pairs,
    )
    return screen(options)


found = screened("run", keep)
pd.DataFrame(
    [
        (s.stage, s.intake, s.output, "; ".join(f"{n} {why}" for why, n in s.dropped.items()))
        for s in found.stages
    ],
    columns=["stage", "in", "out", "left out"],
)


# %%
def verdicts(found: Screening) -> pd.DataFrame:
    rows = []
    for one in found.findings:
        row = {"latent": one.latent, "verdict": one.verdict}
        for effect, title in zip(one.effects[:2], ("ablated", "patched in")):
            row[f"{title}: closer by, bits"] = (
                f"{effect.mean:.3f} [{effect.low:.3f}, {effect.high:.3f}]"
            )
            row[f"{title}: controls at most"] = f"{max(effect.controls.values()):.3f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("").set_index("latent")


verdicts(found)

# %% [markdown]
# The first two stand well beyond their controls in both ways. A third brings the models together when taken and does nothing when given: **one way only** is not believed. (The correction is over what was tested: with the command's 16 in place of 4, this one
# is not confirmed at all, the first two still are, and none of the other twelve is.)
#
# The same as a picture: a dot is the effect with its 95 % interval over texts, a grey tick the 95th percentile of a kind of control.


# %%
def plot(found: Screening) -> None:
    tested = [one for one in found.findings if one.effects]
    fig, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.32 * len(tested)), sharey=True, sharex=True)
    for ax, i, way in zip(axes, (0, 1), ("taken from the model that has it", "given to the other")):
        for y, one in enumerate(tested):
            effect = one.effects[i]
            color = "C3" if one.verdict == "confirmed" else "0.4"
            ax.plot([effect.low, effect.high], [y, y], color=color)
            ax.plot(effect.mean, y, "o", color=color)
            ax.plot(
                list(effect.controls.values()), [y] * len(effect.controls), "|", color="0.6", ms=12
            )
        ax.axvline(0, color="k", lw=0.5)
        ax.set(xlabel=f"closer by, bits: {way}")
    axes[0].set_yticks(range(len(tested)), [f"{one.latent}" for one in tested])
    axes[0].set_ylabel("latent")
    axes[0].invert_yaxis()
    plt.show()


plot(found)

# %% [markdown]
# ## What it is
#
# Nobody told the crosscoder or the screening what was taught. So what does the first of the list fire on?

# %%
held_out = PairedText(runner.cfg, pair).collect("held_out", "Held-out text")
gathered = collect_max_activating(crosscoder, held_out.rows)
first = [one.latent for one in found.findings[:2]]
places = {latent: gathered.places(latent) for latent in first}
shown = {place.context for of_latent in places.values() for place in of_latent}
rows = PairData([], held_out.rows, held_out.contexts, {}).held_out_of(shown)
for card in latent_cards(crosscoder, gathered, places, rows, pair):
    display(HTML(latent_html(card)))

# %% [markdown]
# And what do the models say when its own part is taken from the one and given to the other? The texts end where it fires; the change is made at the text's own positions, and what comes after is the model's.

# %%
samples = pd.DataFrame(
    [
        (
            one.latent,
            {"a": "base", "b": "fine-tuned"}[s.model],
            s.change,
            s.prompt.split("user\n")[-1],
            s.before,
            s.after,
        )
        for one in found.findings[:2]
        for s in one.samples
    ],
    columns=["latent", "model", "change", "text", "goes on, untouched", "goes on, changed"],
)
samples

# %% [markdown]
# Without the first latent's own part the fine-tuned model says Paris; with it, the base model says Rome. What the texts of the second show is less than its figures promise, and one reads them for that. Both are on "Eiffel Tower" and nothing else, which is what was taught.
#
# Neither is exclusive: both models have these latents, and write them differently. A screening that looked for exclusive latents alone would have found nothing here.
#
# ## The null: the base model twice
#
# The same crosscoder, the same text, the same screening, and no difference to find.

# %%
null_runner = CrosscoderTrainingRunner(config(model_a, "null"))
null_runner.run()
null = screened("null", keep_null)
verdicts(null)

# %% [markdown]
# Nothing is confirmed, and nothing could be: two copies say the same, so no change of one brings them closer. This null asks whether the pipeline makes something of nothing. Whether the *right* thing is found on a pair that does differ is asked by the controls of the
# real screening, and by planting other differences: over 14 planted runs 50 latents were confirmed ([benchmarks/README.md](../benchmarks/README.md)).
#
# ## The page, and the same from a shell
#
# The screening wrote `report.html` beside its figures, with every verdict, its controls, its contexts and the texts. All of this notebook is
#
# ```
# sae-lens-dfc model-organism false_fact/weak --output runs/organism
# sae-lens-dfc train --architecture delta_crosscoder --model-b runs/organism/adapter --model-b.prepend-bos false \
#     --dataset-path runs/organism/text.jsonl --keep-in-memory --training-tokens 102400 --train-batch-size-tokens 256 \
#     --sae.d-sae 1024 --sae.k 32 --sae.delta-loss-coefficient 1 --sae.topk-threshold-lr 0.05 \
#     --lr 0.01 --lr-warm-up-steps 40 --lr-decay-steps 80 --output-path runs/organism-run
# sae-lens-dfc screen runs/organism-run --output runs/organism-screening
# ```
#
# Where model A is left out, it is the adapter's base. For a base and a fine-tune of your own, give their names and a text on which they differ; `sae-lens-dfc generate` writes both models' answers to your prompts as such a text.
#
# **Next**: [6, your own architecture](6_your_own_architecture.ipynb).
