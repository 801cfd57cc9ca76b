"""A page as a class: one method for each HTTP verb.

streamd -A examples/counter_view.py worker -l info
curl 127.0.0.1:6066/counter/
curl -X POST '127.0.0.1:6066/counter/?n=3'
curl -X DELETE 127.0.0.1:6066/counter/
"""

import streamd
from streamd.web import Request, Response, View

app = streamd.App("counter-view")


@app.page("/counter/")
class counter(View):
    """A counter; one object in each process answers all requests."""

    count: int = 0

    async def get(self, request: Request) -> Response:
        return self.json({"count": self.count})

    async def post(self, request: Request) -> Response:
        n = int(request.query.get("n", "1"))
        self.count += n
        return self.json({"count": self.count})

    async def delete(self, request: Request) -> Response:
        self.count = 0
        return self.json({"count": self.count})
