"""Small programs that use outbox-relay with real parts; each is run by the tests."""
