"""`python -m resnet_fused` is the command `resnet-fused`."""

import sys

from resnet_fused.cli import main

sys.exit(main())
