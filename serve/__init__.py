"""Pictures for others: batches, a server, several machines. Nothing heavy is imported here."""
