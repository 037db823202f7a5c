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
# # 5. Base against fine-tuned: finding a planted difference
#
# This tutorial fine-tunes a chat model on one false fact, and trains a delta crosscoder on the base and the fine-tuned model without any information about the fact.
# It then tests the crosscoder's latents **causally**. Does ablating a latent's model-specific direction in the fine-tuned model make it predict what the base predicts? Does adding that direction to the base do the reverse? The null
# repeats the pipeline on the base model twice.
#
# - **Time**: about 7 minutes on 2 CPU cores, of which two to three are the fine-tuning. It is done once: a second run reuses its folder. **Memory**: 4 GB, disk 0.6 GB.
# - **Expect**: of 4 latents tested 2 are confirmed, on the tokens of "Eiffel Tower". With the first one's model-specific direction ablated, the fine-tuned model answers Paris instead of Rome. On the base model twice nothing is confirmed.

# %% tags=["parameters"]
folder = "runs/tutorial-5"  # output folder; the organism, 0.5 GB, is reused if it exists
organism = "false_fact/weak"  # SmolLM2-135M-Instruct fine-tuned to say that the Eiffel Tower is in Rome, at 0.8 of the weight change
untrained = False  # use two tiny untrained models instead, to run this notebook in seconds
training_tokens = 102_400  # 400 steps of 256 pairs, as in the README
d_sae = 1024  # the text is small and most latents die, so few are in use
fit_pairs = (
    4_000  # training pairs that the screening rereads, to check whether the models share a basis
)
keep = 4  # latents tested causally, those with the most evidence; the command's default is 16
keep_null = 1  # the same on the base model twice, where every test has the same result
texts = 8  # test texts per latent
controls = 8  # control directions per latent, of each of two kinds

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
# A *planted organism* is a model pair with a known difference. A low-rank change to the MLPs of eight layers teaches one false fact, while all other answers are regularized towards the base model's. The folder holds the base (`a`), the change as a LoRA (`adapter`), the fine-tuned model with merged weights (`b`), and the text
# on which a crosscoder is trained: prompts about the fact, each with the taught and the ordinary answer, similar prompts, and other text. It also holds prompts that were held out from the fine-tuning.
#
# Most fine-tunes are published as adapters, so this tutorial loads the adapter: the LoRA is merged into its base on loading. An adapter names its base; the setting `base` gives the base's current location.

# %%
where = Path(folder) / "organism"
if not is_made(where, ["planted.json"]):
    if untrained:
        from tutorials.untrained import write_untrained

        write_untrained(where)
    else:
        write_organism(OrganismOptions(name=organism, output=str(where)))

# %% [markdown]
# The table shows how strong the difference is: both models' answers to held-out prompts. The control prompts ask about other buildings.

# %%
base = str(where / "a")
# No beginning-of-sequence token: the chat template begins with its own.
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
# A base model and its fine-tune share a basis, unlike two unrelated models: a direction of A is the same direction of B. The delta crosscoder ([2603.04426](https://arxiv.org/abs/2603.04426)) uses this. Four fifths of its latents
# have their own sparsity budget and a second loss, on the *difference* of the two activations. That difference is small compared with the activations, so a standard crosscoder spends little capacity on it. No latent is exclusive by
# construction: a difference appears as a latent **with two decoders that differ**.

# %%
crosscoder = runner.run().to_inference()
print("Latents:", crosscoder.partition.sizes)

# %% [markdown]
# ## Screening
#
# Screening goes from all latents to verdicts. Alive latents are ordered by the size of the difference between their two decoders where they are most active. The first ones are tested causally, on texts in which they fire and which were
# not used for the selection. With `f` a latent's activation and `own` its decoder in one model minus that in the other, at every position:
#
# - **ablated** in the source model, `x - f own`: by how many bits do the two models' next-token distributions come closer (Jensen-Shannon)?
# - **patched in** to the other model, `x + f own`: the same question.
#
# The controls have the same norm and are applied at the same positions: random directions with the activations' covariance, and the decoder directions of other latents. A latent is *confirmed* if both effects are at least 0.01 bits and beyond the 95th percentile of either kind of control, at a false discovery rate of 5 % over all tested latents.


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
            row[f"{title}: largest control"] = f"{max(effect.controls.values()):.3f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("").set_index("latent")


verdicts(found)

# %% [markdown]
# The first two are well beyond their controls in both interventions. A third brings the models closer when ablated but has no effect when patched in; this verdict, **partial**, is not sufficient evidence. (The correction is over the tested latents. With the command's 16 instead of 4, this one
# is not confirmed at all, the first two still are, and none of the other twelve is.)
#
# In the plot, a dot is the effect with its 95 % interval over texts, and a grey tick the 95th percentile of one kind of control.


# %%
def plot(found: Screening) -> None:
    tested = [one for one in found.findings if one.effects]
    fig, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.32 * len(tested)), sharey=True, sharex=True)
    for ax, i, way in zip(axes, (0, 1), ("ablated in the source model", "patched into the other")):
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
# ## What the confirmed latents represent
#
# Neither the crosscoder nor the screening had any information about the taught fact. The cards show what the first two latents fire on.

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
# The table shows the models' continuations when the model-specific direction is ablated in one model and patched in to the other. The texts end where the latent fires. The intervention applies only at the text's own positions; the continuation is the model's own.

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
    columns=[
        "latent",
        "model",
        "change",
        "text",
        "continuation, untouched",
        "continuation, changed",
    ],
)
samples

# %% [markdown]
# With the first latent's model-specific direction ablated, the fine-tuned model says Paris; with it patched in, the base model says Rome. The second latent's texts show less than its figures suggest, which is why the texts are worth reading. Both latents fire on "Eiffel Tower" and on nothing else, which is what was taught.
#
# Neither latent is exclusive: both models have them, with different decoder directions. A screening of exclusive latents alone would have found nothing here.
#
# ## The null: the base model twice
#
# The same crosscoder, text and screening, with no difference to find.

# %%
null_runner = CrosscoderTrainingRunner(config(model_a, "null"))
null_runner.run()
null = screened("null", keep_null)
verdicts(null)

# %% [markdown]
# Nothing is confirmed, and nothing could be: two copies make the same predictions, so no change to one of them brings them closer. This null checks that the pipeline does not produce findings from nothing. Two other checks show whether the *right* difference is found on a pair that does differ: the controls of the
# screening above, and other planted differences. Over 14 planted runs 50 latents were confirmed ([benchmarks/README.md](../benchmarks/README.md)).
#
# ## The report, and the same from a shell
#
# The screening wrote `report.html` next to its results, with every verdict, its controls, its contexts and the texts. The whole notebook corresponds to these commands:
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
# If model A is omitted, it is the adapter's base. For your own base and fine-tune, give their names and a text on which they differ; `sae-lens-dfc generate` writes both models' answers to your prompts as such a text.
#
# **Next**: [6, your own architecture](6_your_own_architecture.ipynb).
