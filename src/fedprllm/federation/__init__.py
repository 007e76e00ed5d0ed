"""A federation over the network: the coordinator, the participants' sites, and the messages between them."""
