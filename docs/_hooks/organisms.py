"""The table of docs/how-to/organisms.md, made from sae_lens_dfc/training/recipes/organisms.yaml:
run this file after a change of either."""

import re
from pathlib import Path

from sae_lens_dfc.training.recipes.organisms import Base, PublicOrganism, organisms

PAGE = Path(__file__).parents[1] / "how-to" / "organisms.md"
TABLE = re.compile(r"(?<=<!-- organisms -->\n\n).*?(?=\n\n<!-- end -->)", flags=re.DOTALL)
HUB = "https://huggingface.co"


def with_table(page: str) -> str:
    """The page with the table as the file has it now."""
    table = "\n".join(
        [
            "| recipe | what changed | model B | model A | license of B; of A | read in |",
            "|---|---|---|---|---|---|",
            *(_row(organism) for organism in organisms().values()),
        ]
    )
    return TABLE.sub(lambda _: table, page)


def _row(organism: PublicOrganism) -> str:
    folder = f", `{organism.subfolder}/`" if organism.subfolder else ""
    cells = (
        f"`{organism.name}`",
        organism.behavior,
        f"[{organism.model}]({HUB}/{organism.model}){folder} ({organism.kind})",
        _base(organism.base),
        f"{organism.license}; {organism.base.license}",
        f"[source]({organism.source})",
    )
    return f"| {' | '.join(cells)} |"


def _base(base: Base) -> str:
    return f"[{base.name}]({HUB}/{base.name}), block {base.layer} of {base.n_layers}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
