"""One file a page; each is run by Streamlit as a script."""
