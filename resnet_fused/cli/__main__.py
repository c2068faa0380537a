"""`python -m resnet_fused.cli`."""

import sys

from resnet_fused.cli import main

if __name__ == "__main__":
    sys.exit(main())
