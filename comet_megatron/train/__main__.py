"""python -m comet_megatron.train: see comet_megatron/train/main.py."""

import sys

from comet_megatron.train.main import main

sys.exit(main())
