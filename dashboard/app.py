"""The entry of the dashboard: `streamlit run dashboard/app.py`, with the data folder in TUNER_DATA_DIR."""

import streamlit as st

from dashboard import page
from dashboard.words import escaped

st.set_page_config(page_title="Tuner", page_icon="🎛️", layout="wide", initial_sidebar_state="auto")

pages = [
    st.Page("views/overview.py", title="Overview", icon="📡", default=True),
    st.Page("views/history.py", title="History", icon="📈"),
    st.Page("views/experiments.py", title="Experiments", icon="🧪"),
    st.Page("views/recommendations.py", title="Recommendations", icon="✅"),
]
chosen = st.navigation(pages)
with st.sidebar:
    st.toggle("Live", value=True, key="live", help="Off: the page stands still until you turn it on again.")
    st.caption(f"Data folder: {escaped(page.data_dir())}")
    st.caption(f"Times are local ({escaped(page.zone())}); tooltips give UTC.")
chosen.run()
