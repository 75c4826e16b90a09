"""`python -m benchmarks NAME INPUT VARIANT` prints the peak memory of one variant; `headwise bench` calls it."""

import sys

from benchmarks import report_peak

print(report_peak(*sys.argv[1:4]))
