"""The output of `--print-capabilities` for each command ("Backend program conventions").

Management programs ask for it each time they start, so this module imports no other.
"""

CAPABILITIES = {
    "blk": """\
{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}""",
}
