"""The command line with accelerate's FSDP on CPUs: started by test_launched.py through `accelerate launch`.

accelerate turns FSDP on for accelerators only, and on CPUs goes on with DDP without a word. All that comes behind that
switch (its preparation of the model, its checkpoints, its gathering) runs over gloo too; so the switch alone is opened.
"""

import sys

from accelerate import DistributedType, PartialState

started = PartialState.__init__


def start(self, *arguments, **options):
    started(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU  # any kind with a switch; the device stays the CPU


PartialState.__init__ = start

if __name__ == "__main__":
    from dual_lora.lab.cli import main

    sys.exit(main())
