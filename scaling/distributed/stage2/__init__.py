"""Stage 2 on Ray actors: batches of scenes are handed out, fitted and committed."""
