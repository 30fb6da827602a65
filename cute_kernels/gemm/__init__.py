"""Matrix products on Hopper tensor cores, with fused epilogues."""
