"""
Relays as they are, on tables and a broker that a test decides about, by a clock that it tells.

Each thread of a relay is a greenlet instead, which stands still wherever it waits for the world: at a connection, a
statement, a publication or a pause. The test answers one of them at a time, with a success or with a fault, so that
threads and processes meet in every order and a run can be repeated. Nothing of the relay is imitated, only what is
around it.
"""
