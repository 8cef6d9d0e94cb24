"""A comparison from Python, looked at with pandas.

    pip install ".[examples]"          # in the checkout: pandas is no dependency of kvpolicy itself
    python docs/examples/compare_with_pandas.py

It runs three recipes on the same samples with the bundled model. `Comparison.rows` is a list of plain records, one
per recipe and sample, so a DataFrame takes it as it is. The program prints the mean of some metrics per recipe, the
difference of two recipes sample by sample, and the samples that differ most from the exact cache. It writes all rows
to rows.csv. A real comparison needs more samples than these three.
"""

import pandas as pd

import kvpolicy

METRICS = ["bits", "score", "nll", "kl", "top1", "l1"]

result = kvpolicy.compare(
    {"exact": "full", "2 bits": "logquant", "4 bits": "logquant:nbits=4"},
    task="arithmetic",
    n=3,
    tokens=300,
    progress=False,
)
rows = pd.DataFrame(result.rows)
print(rows.groupby("arm", sort=False)[METRICS].mean().round(3).to_string())

# All recipes saw the same samples, so they are compared sample by sample.
nll = rows.pivot(index="sample", columns="arm", values="nll")
print("\n2 bits minus 4 bits, nats per token of each sample:")
print((nll["2 bits"] - nll["4 bits"]).round(4).to_string())
print("mean with its 95% confidence interval:", result.difference("2 bits", "4 bits", metric="nll"))

worst = rows.sort_values("kl", ascending=False).head(3)
print("\nfarthest from the exact cache:")
print(worst[["sample", "arm", "kl", "answer", "generated"]].to_string(index=False))

# The records hold lists too (a number for each step, or layer): leave them out of a flat file.
flat = rows.loc[:, [not isinstance(value, list) for value in rows.iloc[0]]]
flat.to_csv("rows.csv", index=False)
