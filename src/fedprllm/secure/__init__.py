"""Secure aggregation: a server adds up what participants share without seeing what any one of them shares.

Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning (CCS 2017): the variant
against a malicious server, with signatures, on the complete graph of participants.

| module | what it does |
|---|---|
| `shamir` | splits a secret so that some of its holders together can restore it |
| `streams` | adds masks to words, and takes them off |
| `keys` | signatures, key agreement and sealed boxes, from the library `cryptography` |
| `terms` | what all participants of a session must have been asked alike; the threshold; the roster |
| `journal` | answers are durable before they are sent, and never change |
| `participant` | a participant's side |
| `server` | the server's side |
| `words` | votes as words |
| `in_process` | all parties of a session in one process |

This room knows neither models nor networks: names and words in, bytes and words out.
"""
