"""What the compiler did, for people: tables, graphs as code, FLOPs, token maps. Nothing else imports this."""
