"""What `--print-capabilities` prints, by command (vhost-user, "Backend program conventions").

Management programs ask each time they start, so this needs no other module.
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
