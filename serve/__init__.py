"""Pictures for others: batches, a server, several machines. Nothing heavy is imported here.

The seam for what else wants pictures made: a `pool.Pool` takes an `asks.Ask` and gives a
`jobs.Job`, which tells its steps, previews and pictures; `app.create_app(config)` is the whole
server, with all of this in `app.state.served`.
"""
