"""Where bytes lie: one file a medium, behind the contracts of `tiers.base`."""
