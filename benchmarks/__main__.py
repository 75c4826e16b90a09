"""`python -m benchmarks NAME INPUT VARIANT DEVICE DTYPE` prints a variant's peak memory; `headwise bench` calls it."""

import sys

from benchmarks import report_peak

print(report_peak(*sys.argv[1:6]))
