"""A page that counts how often it is asked for.

streamd -A examples/counting_page.py worker -l info
curl 127.0.0.1:6066/count/
"""

import streamd

app = streamd.App("counting-page")

# In the memory of the process that answers this page: gone when the process is replaced.
# What must last belongs in a table.
count = [0]


@app.page("/count/")
async def get_count(self, request):
    """How often this was asked."""
    count[0] += 1
    return self.json({"count": count[0]})
