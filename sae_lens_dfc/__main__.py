"""`sae-lens-dfc` and `python -m sae_lens_dfc`: see `sae_lens_dfc.cli.main`."""

import sys

from sae_lens_dfc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
