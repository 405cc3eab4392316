"""How a connection begins: hello, and where a token is wanted, a challenge that proves it on both sides."""

import hmac
import logging
import secrets

from kvstore import protocol
from kvstore.errors import ProtocolError, Unauthorized

logger = logging.getLogger(__name__)


class Greeting:
    """One connection's. `token` is None where none is wanted."""

    def __init__(self, token: str | None, client: str) -> None:
        self._token = token
        self._client = client
        self._nonce = b""
        self.hello: protocol.Hello | None = None
        self.done = False

    def receive(self, request: protocol.Message) -> protocol.Challenge | None:
        """What to answer; None once the client is welcome.

        Raises:
            ProtocolError: this message was not due, or is of another major version.
            Unauthorized: the token is wrong.
        """
        if isinstance(request, protocol.Hello) and self.hello is None:
            return self._hello(request)
        if isinstance(request, protocol.Proof) and self.hello is not None:
            wanted = protocol.token_proof(self._token or "", "client", self.hello.nonce, self._nonce)
            if not hmac.compare_digest(wanted, request.proof):
                logger.warning("refused a client without the right token: %s", self._client)
                raise Unauthorized("the token is wrong; give the daemon's token")
            self.done = True
            return None
        due = "Hello" if self.hello is None else "Proof"
        raise ProtocolError(f"{type(request).__name__} before {due}; send {due} first")

    def _hello(self, hello: protocol.Hello) -> protocol.Challenge | None:
        if hello.major != protocol.MAJOR:
            raise ProtocolError(
                f"protocol {hello.major}.{hello.minor} asked for; this daemon speaks "
                f"{protocol.MAJOR}.{protocol.MINOR}: use a client of the daemon's version"
            )
        self.hello = hello
        if self._token is None:
            self.done = True
            return None
        self._nonce = secrets.token_bytes(32)
        return protocol.Challenge(
            self._nonce, protocol.token_proof(self._token, "daemon", hello.nonce, self._nonce)
        )
