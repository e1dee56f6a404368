"""``make reproduce``: the paper's comparisons on the quickstart's task, with answers to what one asks of them."""
