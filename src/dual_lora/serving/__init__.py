"""Adapters in inference servers: composed into a checkpoint's weights as a server reads them."""
