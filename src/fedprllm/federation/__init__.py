"""Federation over a network: the coordinator, the participants' sites and the messages between them."""
