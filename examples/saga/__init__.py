"""
An order as a saga: payment, inventory and shipping each in a database of their own, and no transaction across them.

Read `machine` first: what is done in which order, and what takes it back. Then `orders`, which keeps that machine in
its database and sends commands; `participant`, the rules that let a service take part safely; and one of `payment`,
`inventory` and `shipping`. `service` runs each of them as a process, `demo` all of them: `python -m examples.saga`.
"""
